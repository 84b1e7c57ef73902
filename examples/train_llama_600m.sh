#!/usr/bin/env bash
# Pre-train the MeCo paper's 600M model (arXiv 2501.01956, tables 6 and 7), or its baseline.
# train_llama.sh holds what all sizes share; --help prints its variables.
SIZE=600m
: "${NUM_LAYERS:=24}" "${HIDDEN_SIZE:=1024}" "${FFN_HIDDEN_SIZE:=4096}"
: "${NUM_ATTENTION_HEADS:=16}" "${NUM_QUERY_GROUPS:=16}"
. "$(dirname "${BASH_SOURCE[0]}")/train_llama.sh"
