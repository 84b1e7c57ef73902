#!/usr/bin/env bash
# Pre-train the MeCo paper's 3B model (arXiv 2501.01956, tables 6 and 7), or its baseline.
# train_llama.sh holds what all sizes share; --help prints its variables.
SIZE=3b
: "${MECO_NUM_LAYERS:=28}" "${MECO_HIDDEN_SIZE:=3072}" "${MECO_FFN_HIDDEN_SIZE:=8192}"
: "${MECO_NUM_ATTENTION_HEADS:=24}" "${MECO_NUM_QUERY_GROUPS:=8}"
. "$(dirname "${BASH_SOURCE[0]}")/train_llama.sh"
