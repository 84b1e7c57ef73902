#!/usr/bin/env bash
# Pre-train the MeCo paper's 3B model (arXiv 2501.01956, tables 6 and 7), or its baseline.
# train_llama.sh holds what all sizes share; --help prints its variables.
SIZE=3b
. "$(dirname "${BASH_SOURCE[0]}")/train_llama.sh"
