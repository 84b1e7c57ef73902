#!/usr/bin/env bash
# Pre-train the MeCo paper's 8B model on sequences of 32,768 tokens, each over four context-parallel
# ranks. Length, RoPE base and layout are ours, not the paper's.
# train_llama.sh holds what all sizes share; --help prints its variables.
SIZE=8b-32k
. "$(dirname "${BASH_SOURCE[0]}")/train_llama.sh"
