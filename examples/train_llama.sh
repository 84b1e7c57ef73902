# shellcheck shell=bash
# What the launchers of the MeCo paper's four models share; sourced by train_llama_SIZE.sh.
#
#   examples/train_llama_1.6b.sh [--dry-run | --help] [-- MORE_FLAGS...]
#
# One call starts one node with torchrun; slurm/train_llama.sbatch makes the calls under Slurm.
# --dry-run prints the full command and an estimate of the memory of a GPU, and starts nothing.
# MORE_FLAGS go to the training script last, so they win; layouts are better changed by the
# variables, which keep the flags that follow from them right. Every variable has a default:
#
#   MECO=1                  1: metadata conditioning; 0: the matched baseline (the same packing,
#                           phases and samples rules with an empty template)
#   TEMPLATE PACKING        the template 'URL: {url.host}\n\n', and truncate: both as in the paper
#   COOLDOWN_FRACTION       0.1 (8b: 0.125) of the iterations
#   DATA_PATH               data/dclm; weights and paths in turn for a blend
#   COOLDOWN_DATA_PATH      empty: held out of DATA_PATH; else corpora of the cooldown's own
#   SPLIT                   999,1,0: shares of training, validation and test
#   TOKENIZER_MODEL         data/llama3-tokenizer, a Hugging Face folder (meco tokenizer llama3)
#   VOCAB_SIZE              128256; used for the memory estimate alone
#   OUTPUT                  runs/llama-SIZE-meco or -baseline: checkpoints/ and tensorboard/
#   DATA_CACHE              runs/cache: plans and prefix tables, for all runs
#   NUM_LAYERS HIDDEN_SIZE FFN_HIDDEN_SIZE NUM_ATTENTION_HEADS NUM_QUERY_GROUPS    by size
#   SEQ_LENGTH=8192  GLOBAL_BATCH_SIZE=512 (sequences: 4,194,304 tokens)  TRAIN_ITERS=40000 (8b: 20000)
#   LR=3e-3 (8b: 5e-4)  MIN_LR (a tenth of LR)  LR_WARMUP_FRACTION=0.05  WEIGHT_DECAY=0.033 (8b: 0.1)
#   SEED=1234  NUM_WORKERS=2  SAVE_INTERVAL=4000  EVAL_INTERVAL=2000  EVAL_ITERS=20  LOG_INTERVAL=10
#   NNODES=1  NODE_RANK=0  GPUS_PER_NODE=8  MASTER_ADDR=127.0.0.1  MASTER_PORT=29500
#   TP=1 (8b: 2)  PP=1  MICRO_BATCH_SIZE=1
#   TRANSFORMER_IMPL        transformer_engine; local runs without it, also on a CPU
#   FP8=0                   1: matrix products in FP8 (hybrid, FP8_RECIPE=tensorwise)
#   PYTHON                  the repository's .venv/bin/python, else python3
#   TRAIN_SCRIPT            examples/pretrain_gpt.py; a script of yours that takes the same flags
#
# The defaults of the layout are meant for 8 GPUs of 80 GB, and with NNODES=4 for 32. What the paper
# does not give (Adam's epsilon, the clip at 1, the seed) is Megatron's own default.
#
# What was given up: fused layers and kernels that only a measurement on a GPU could justify. They
# are flags of Megatron, and MORE_FLAGS takes them.
set -euo pipefail
# Commas as decimal points would end up in flags.
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

: "${MECO:=1}" "${PACKING:=truncate}" "${COOLDOWN_FRACTION:=0.1}"
# Not in the braces of an expansion, which would end at the template's own brace.
TEMPLATE=${TEMPLATE-'URL: {url.host}\n\n'}
: "${DATA_PATH:=data/dclm}" "${COOLDOWN_DATA_PATH:=}" "${SPLIT:=999,1,0}"
: "${TOKENIZER_MODEL:=data/llama3-tokenizer}" "${VOCAB_SIZE:=128256}" "${DATA_CACHE:=runs/cache}"
: "${SEQ_LENGTH:=8192}" "${GLOBAL_BATCH_SIZE:=512}" "${TRAIN_ITERS:=40000}"
: "${LR:=3e-3}" "${LR_WARMUP_FRACTION:=0.05}" "${WEIGHT_DECAY:=0.033}" "${SEED:=1234}"
: "${NUM_WORKERS:=2}" "${SAVE_INTERVAL:=4000}" "${EVAL_INTERVAL:=2000}" "${EVAL_ITERS:=20}"
: "${TRAIN_SCRIPT:=$root/examples/pretrain_gpt.py}" "${LOG_INTERVAL:=10}" "${NNODES:=1}" "${NODE_RANK:=0}" "${GPUS_PER_NODE:=8}"
: "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}" "${TP:=1}" "${PP:=1}" "${MICRO_BATCH_SIZE:=1}"
: "${TRANSFORMER_IMPL:=transformer_engine}" "${FP8:=0}" "${FP8_RECIPE:=tensorwise}"

refuse() {
    printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

check_values() {
    local name
    for name in NUM_LAYERS HIDDEN_SIZE FFN_HIDDEN_SIZE NUM_ATTENTION_HEADS NUM_QUERY_GROUPS \
        VOCAB_SIZE SEQ_LENGTH GLOBAL_BATCH_SIZE TRAIN_ITERS SAVE_INTERVAL EVAL_INTERVAL \
        EVAL_ITERS LOG_INTERVAL NNODES GPUS_PER_NODE MASTER_PORT TP PP MICRO_BATCH_SIZE; do
        [[ ${!name} =~ ^[1-9][0-9]{0,11}$ ]] ||
            refuse "$name=${!name}: not a whole number above 0. Correct or unset the variable."
    done
    for name in SEED NUM_WORKERS NODE_RANK; do
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
            refuse "$name=${!name}: not a whole number. Correct or unset the variable."
    done
    for name in LR WEIGHT_DECAY LR_WARMUP_FRACTION COOLDOWN_FRACTION ${MIN_LR:+MIN_LR}; do
        [[ ${!name} =~ ^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$ ]] ||
            refuse "$name=${!name}: not a number. Write it as 0.0005 or 5e-4."
    done
    for name in MECO FP8; do
        [[ ${!name} =~ ^[01]$ ]] || refuse "$name=${!name}: neither 0 nor 1. Give one of them."
    done
    [[ $TRANSFORMER_IMPL =~ ^(transformer_engine|local)$ ]] ||
        refuse "TRANSFORMER_IMPL=$TRANSFORMER_IMPL: give transformer_engine or local."
    ((FP8 == 0)) || [[ $TRANSFORMER_IMPL == transformer_engine ]] ||
        refuse "FP8=1 needs TRANSFORMER_IMPL=transformer_engine. Drop one of them."
    ((NODE_RANK < NNODES)) ||
        refuse "NODE_RANK=$NODE_RANK: there are NNODES=$NNODES, counted from 0."
    ((HIDDEN_SIZE % NUM_ATTENTION_HEADS == 0)) ||
        refuse "HIDDEN_SIZE=$HIDDEN_SIZE: not a multiple of NUM_ATTENTION_HEADS=$NUM_ATTENTION_HEADS."
    ((NUM_ATTENTION_HEADS % NUM_QUERY_GROUPS == 0)) ||
        refuse "NUM_ATTENTION_HEADS=$NUM_ATTENTION_HEADS: not a multiple of" \
            "NUM_QUERY_GROUPS=$NUM_QUERY_GROUPS."
    ((NUM_QUERY_GROUPS % TP == 0 && FFN_HIDDEN_SIZE % TP == 0 && 128 % TP == 0)) ||
        refuse "TP=$TP: NUM_QUERY_GROUPS=$NUM_QUERY_GROUPS, FFN_HIDDEN_SIZE=$FFN_HIDDEN_SIZE and" \
            "128 must be multiples of it. Give 1, 2, 4 or 8."
    ((NUM_LAYERS % PP == 0)) || refuse "PP=$PP: NUM_LAYERS=$NUM_LAYERS is not a multiple of it."
    local gpus=$((NNODES * GPUS_PER_NODE))
    ((gpus % (TP * PP) == 0)) ||
        refuse "TP=$TP, PP=$PP: NNODES * GPUS_PER_NODE = $gpus GPUs are not a multiple of TP * PP."
    local samples=$((MICRO_BATCH_SIZE * (gpus / (TP * PP))))
    ((GLOBAL_BATCH_SIZE % samples == 0)) ||
        refuse "GLOBAL_BATCH_SIZE=$GLOBAL_BATCH_SIZE: not a multiple of $samples, the" \
            "MICRO_BATCH_SIZE of all data-parallel ranks together."
}

make_command() {
    local data cooldown
    # Blends are lists; paths with spaces are Megatron's own limit.
    read -r -a data <<<"$DATA_PATH"
    read -r -a cooldown <<<"$COOLDOWN_DATA_PATH"
    ((${#data[@]})) || refuse "DATA_PATH is blank. Give a prepared corpus, or unset it."
    launch=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node-rank "$NODE_RANK"
        --nproc-per-node "$GPUS_PER_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    flags=(
        --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE"
        --ffn-hidden-size "$FFN_HIDDEN_SIZE" --num-attention-heads "$NUM_ATTENTION_HEADS"
        --group-query-attention --num-query-groups "$NUM_QUERY_GROUPS"
        --position-embedding-type rope --rotary-base 500000
        --swiglu --normalization RMSNorm --norm-epsilon 1e-5 --init-method-std 0.02
        --disable-bias-linear --untie-embeddings-and-output-weights
        --attention-dropout 0 --hidden-dropout 0
        # TP times this stays 128, so that every layout has the same padded vocabulary.
        --make-vocab-size-divisible-by "$((128 / TP))"

        --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
        --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
        --train-iters "$TRAIN_ITERS" --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95
        --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine
        --lr-warmup-fraction "$LR_WARMUP_FRACTION" --weight-decay "$WEIGHT_DECAY" --clip-grad 1.0
        --seed "$SEED"
        # Prefixes are out of the loss, so micro-batches hold different numbers of trained tokens.
        --calculate-per-token-loss

        --bf16 --transformer-impl "$TRANSFORMER_IMPL" --cross-entropy-loss-fusion
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        # Ranks wait for the one that plans a large corpus; ten minutes are the default.
        --distributed-timeout-minutes 60
        --manual-gc --manual-gc-interval 100

        --meco --meco-template "$TEMPLATE" --meco-packing "$PACKING"
        --meco-cooldown-fraction "$COOLDOWN_FRACTION"
        --data-path "${data[@]}" --split "$SPLIT" --data-cache-path "$DATA_CACHE"
        --num-workers "$NUM_WORKERS"
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER_MODEL"

        --save "$OUTPUT/checkpoints" --load "$OUTPUT/checkpoints" --save-interval "$SAVE_INTERVAL"
        --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
        --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" --log-interval "$LOG_INTERVAL"
        --log-throughput --tensorboard-dir "$OUTPUT/tensorboard"
    )
    if ((${#cooldown[@]})); then flags+=(--meco-cooldown-data-path "${cooldown[@]}"); fi
    if ((TP > 1)); then flags+=(--sequence-parallel); fi
    if ((FP8)); then flags+=(--fp8-format hybrid --fp8-recipe "$FP8_RECIPE"); fi
    # Kernels of Transformer Engine that Megatron would otherwise expect.
    if [[ $TRANSFORMER_IMPL == local ]]; then
        flags+=(--no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion)
    fi
    flags+=("$@")
}

# One flag with its values on a line, quoted for a shell.
print_command() {
    local word
    printf '%q' "$1"
    for word in "${@:2}"; do
        if [[ $word == --* || $word == "$TRAIN_SCRIPT" ]]; then printf ' \\\n   '; fi
        printf ' %q' "$word"
    done
    printf '\n'
}

dry_run=
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --help | -h)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --)
            shift
            break
            ;;
        *) refuse "$1: unknown argument. Flags for the training script follow after --; see --help." ;;
    esac
    shift
done

check_values
if ((MECO == 0)); then TEMPLATE=; fi
if [[ -z ${MIN_LR:-} ]]; then MIN_LR=$(awk -v lr="$LR" 'BEGIN { printf "%.6g", lr / 10 }'); fi
if [[ -z ${OUTPUT:-} ]]; then
    OUTPUT=runs/llama-$SIZE-meco
    if ((MECO == 0)); then OUTPUT=runs/llama-$SIZE-baseline; fi
fi
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi
make_command "$@"

# The state of delayed scaling is pickled in checkpoints, which Transformer Engine from 2.18 on reads
# when it is told to: else no run with it could go on. These checkpoints are the run's own.
if ((FP8)) && [[ $FP8_RECIPE == delayed ]]; then
    export NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE="${NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE:-1}"
fi
# Megatron asks for it with tensor parallelism on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
command=("${launch[@]}" "$TRAIN_SCRIPT" "${flags[@]}")
if [[ $dry_run ]]; then
    print_command "${command[@]}"
    exec "$PYTHON" "$root/examples/estimate_memory.py" --gpus "$((NNODES * GPUS_PER_NODE))" \
        --vocab-size "$VOCAB_SIZE" -- "${flags[@]}"
fi
exec "${command[@]}"
