#!/usr/bin/env bash
# Pre-train the MeCo paper's 1.6B model (arXiv 2501.01956, tables 6 and 7), or its baseline.
# train_llama.sh holds what all sizes share; --help prints its variables.
SIZE=1.6b
: "${MECO_NUM_LAYERS:=24}" "${MECO_HIDDEN_SIZE:=2048}" "${MECO_FFN_HIDDEN_SIZE:=5504}"
: "${MECO_NUM_ATTENTION_HEADS:=16}" "${MECO_NUM_QUERY_GROUPS:=8}"
. "$(dirname "${BASH_SOURCE[0]}")/train_llama.sh"
