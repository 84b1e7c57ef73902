#!/usr/bin/env bash
# Pre-train the MeCo paper's 8B model (arXiv 2501.01956, tables 6 and 7), or its baseline.
# train_llama.sh holds what all sizes share; --help prints its variables.
SIZE=8b
: "${MECO_NUM_LAYERS:=32}" "${MECO_HIDDEN_SIZE:=4096}" "${MECO_FFN_HIDDEN_SIZE:=14336}"
: "${MECO_NUM_ATTENTION_HEADS:=32}" "${MECO_NUM_QUERY_GROUPS:=8}"
# Unlike the others in the paper: 80 billion tokens, of which 10 billion are cooldown, and another
# learning rate and weight decay for stability. The number of query groups is not given there; 8 is
# Llama 3's.
: "${MECO_TRAIN_ITERS:=20000}" "${MECO_COOLDOWN_FRACTION:=0.125}" "${MECO_LR:=5e-4}" "${MECO_WEIGHT_DECAY:=0.1}"
: "${MECO_TP:=2}"
. "$(dirname "${BASH_SOURCE[0]}")/train_llama.sh"
