#!/usr/bin/env bash
# Pre-train the MeCo paper's 600M model (arXiv 2501.01956, tables 6 and 7), or its baseline.
# train_llama.sh holds what all sizes share; --help prints its variables.
SIZE=600m
: "${MECO_NUM_LAYERS:=24}" "${MECO_HIDDEN_SIZE:=1024}" "${MECO_FFN_HIDDEN_SIZE:=4096}"
: "${MECO_NUM_ATTENTION_HEADS:=16}" "${MECO_NUM_QUERY_GROUPS:=16}"
. "$(dirname "${BASH_SOURCE[0]}")/train_llama.sh"
