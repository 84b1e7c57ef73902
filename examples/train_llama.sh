# shellcheck shell=bash
# What the launchers of the MeCo paper's four models, and of a variant, share; sourced by train_llama_SIZE.sh.
#
#   examples/train_llama_1.6b.sh [--dry-run | --help] [-- MORE_FLAGS...]
#
# One call starts one node with torchrun; slurm/train_llama.sbatch makes the calls under Slurm.
# --dry-run prints the full command and an estimate of the memory of a GPU, and starts nothing.
# MORE_FLAGS go to the training script last, so they win; layouts are better changed by the
# variables, which keep the flags that follow from them right. Every variable has a default. Those of
# this launcher begin with MECO_, and one that it does not know stops it; NNODES and the like are
# names that schedulers and other launchers set.
#
#   MECO_CONDITIONING=1     1: metadata conditioning; 0: the matched baseline (the same packing,
#                           phases and samples rules with an empty template)
#   MECO_TEMPLATE           'URL: {url.host}\n\n', as in the paper
#   MECO_PACKING            truncate, as in the paper
#   MECO_COOLDOWN_FRACTION  0.1 (8b: 0.125) of the iterations
#   MECO_DATA_PATH          data/dclm; weights and paths in turn for a blend
#   MECO_COOLDOWN_DATA_PATH empty: held out of MECO_DATA_PATH; else corpora of the cooldown's own
#   MECO_SPLIT              999,1,0: shares of training, validation and test
#   MECO_TOKENIZER_MODEL    data/llama3-tokenizer, a Hugging Face folder (meco tokenizer llama3)
#   MECO_VOCAB_SIZE         128256; used for the memory estimate alone
#   MECO_OUTPUT             runs/llama-SIZE-meco or -baseline: checkpoints/ and tensorboard/
#   MECO_DATA_CACHE         runs/cache: plans and prefix tables, for all runs
#   MECO_NUM_LAYERS MECO_HIDDEN_SIZE MECO_FFN_HIDDEN_SIZE    by size
#   MECO_NUM_ATTENTION_HEADS MECO_NUM_QUERY_GROUPS           by size
#   MECO_SEQ_LENGTH=8192 (8b_32k: 32768)  MECO_TRAIN_ITERS=40000 (8b: 20000)
#   MECO_GLOBAL_BATCH_SIZE=512 (8b_32k: 128; sequences: 4,194,304 tokens)
#   MECO_LR=3e-3 (8b: 5e-4)  MECO_MIN_LR (a tenth of MECO_LR)  MECO_LR_WARMUP_FRACTION=0.05
#   MECO_WEIGHT_DECAY=0.033 (8b: 0.1)  MECO_SEED=1234  MECO_NUM_WORKERS=2  MECO_SAVE_INTERVAL=4000
#   MECO_EVAL_INTERVAL=2000  MECO_EVAL_ITERS=20  MECO_LOG_INTERVAL=10
#   NNODES=1  NODE_RANK=0  GPUS_PER_NODE=8  MASTER_ADDR=127.0.0.1  MASTER_PORT=29500
#   MECO_TP=1 (8b: 2)  MECO_PP=1  MECO_CP=1 (8b_32k: 4)  MECO_MICRO_BATCH_SIZE=1
#   MECO_TRANSFORMER_IMPL   transformer_engine; local runs without it, also on a CPU
#   MECO_FP8=0              1: matrix products in FP8 (hybrid, MECO_FP8_RECIPE=tensorwise)
#   MECO_PYTHON             the repository's .venv/bin/python, else python3
#   MECO_TRAIN_SCRIPT       examples/pretrain_gpt.py; a script of yours that takes the same flags
#
# The defaults of the layout are meant for 8 GPUs of 80 GB, and with NNODES=4 for 32. What the paper
# does not give (Adam's epsilon, the clip at 1, the seed) is Megatron's own default.
#
# What was given up: fused layers and kernels that only a measurement on a GPU could justify. They
# are flags of Megatron, and MORE_FLAGS takes them. The numbers are in megatron_meco/run/presets.yaml,
# where `meco train` (model: llama-SIZE) has them from as well.
set -euo pipefail
# Commas as decimal points would end up in flags.
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() {
    printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

variables=(
    CONDITIONING TEMPLATE PACKING COOLDOWN_FRACTION DATA_PATH COOLDOWN_DATA_PATH SPLIT
    TOKENIZER_MODEL VOCAB_SIZE OUTPUT DATA_CACHE NUM_LAYERS HIDDEN_SIZE FFN_HIDDEN_SIZE
    NUM_ATTENTION_HEADS NUM_QUERY_GROUPS SEQ_LENGTH GLOBAL_BATCH_SIZE TRAIN_ITERS LR MIN_LR
    LR_WARMUP_FRACTION WEIGHT_DECAY SEED NUM_WORKERS SAVE_INTERVAL EVAL_INTERVAL EVAL_ITERS
    LOG_INTERVAL TP PP CP MICRO_BATCH_SIZE TRANSFORMER_IMPL FP8 FP8_RECIPE PYTHON TRAIN_SCRIPT
)

# Set by the caller, not by the defaults of this script or of a size.
is_given() { [[ -v $1 && ${!1@a} == *x* ]]; }

check_names() {
    local name
    # Earlier versions read them without the prefix.
    for name in "${variables[@]:1}"; do
        if is_given "$name" && ! is_given "MECO_$name"; then
            refuse "$name=${!name} is not read: the name is MECO_$name. Set that, or unset $name."
        fi
    done
    # MECO itself was one of them, with these two values; any other belongs to somebody else.
    if is_given MECO && [[ $MECO =~ ^[01]$ ]] && ! is_given MECO_CONDITIONING; then
        refuse "MECO=$MECO is not read: the name is MECO_CONDITIONING. Set that, or unset MECO."
    fi
    # Those of other parts of the repository are none of this launcher's business.
    local known=" ${variables[*]/#/MECO_} MECO_ROOT MECO_SRUN_ARGS MECO_BUILD_JOBS MECO_COMMIT \
MECO_REHEARSE "
    for name in "${!MECO_@}"; do
        if is_given "$name" && [[ $known != *" $name "* ]]; then
            refuse "$name: unknown variable. Correct or unset it; --help lists those that there are."
        fi
    done
}

# The model's flags in order, and their values, of which "true" is a switch.
keys=()
declare -A preset=()

# The variable that changes a flag of the model, or nothing.
variable_of() {
    local name=${1^^}
    name=${name//-/_}
    case $1 in
        meco-*) name=${name#MECO_} ;;
        tensor-model-parallel-size) name=TP ;;
        pipeline-model-parallel-size) name=PP ;;
        context-parallel-size) name=CP ;;
    esac
    [[ " ${variables[*]} " != *" $name "* ]] || printf 'MECO_%s' "$name"
}

# Read a section of the table that `meco train` reads too; keys that are known already keep theirs.
read_preset() {
    local line key value section='' bases=''
    while IFS= read -r line; do
        case $line in
            '  #'* | '') ;;
            '  '*)
                [[ $section == "$1" ]] || continue
                key=${line%%: *} value=${line#*: }
                key=${key#  } value=${value#\'} value=${value%\'}
                if [[ $key == based-on ]]; then
                    bases=${value//[\[\],]/}
                elif [[ ! -v preset[$key] ]]; then
                    keys+=("$key")
                    preset[$key]=$value
                fi
                ;;
            *) section=${line%:} ;;
        esac
    done <"$root/megatron_meco/run/presets.yaml"
    for section in $bases; do read_preset "$section"; done
}

set_defaults() {
    local key name
    read_preset "llama-$SIZE"
    ((${#keys[@]})) || refuse "$root/megatron_meco/run/presets.yaml has no llama-$SIZE."
    # An empty template is the baseline's.
    MECO_TEMPLATE=${MECO_TEMPLATE-${preset[meco-template]}}
    for key in "${keys[@]}"; do
        name=$(variable_of "$key")
        if [[ $name && $name != MECO_TEMPLATE && -z ${!name:-} ]]; then
            printf -v "$name" %s "${preset[$key]}"
        fi
    done
}

: "${MECO_CONDITIONING:=1}" "${MECO_DATA_PATH:=data/dclm}" "${MECO_COOLDOWN_DATA_PATH:=}"
: "${MECO_TOKENIZER_MODEL:=data/llama3-tokenizer}" "${MECO_VOCAB_SIZE:=128256}"
: "${MECO_DATA_CACHE:=runs/cache}" "${MECO_TRAIN_SCRIPT:=$root/examples/pretrain_gpt.py}"
: "${NNODES:=1}" "${NODE_RANK:=0}" "${GPUS_PER_NODE:=8}"
: "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"
: "${MECO_FP8:=0}" "${MECO_FP8_RECIPE:=tensorwise}"

check_values() {
    local name
    for name in MECO_NUM_LAYERS MECO_HIDDEN_SIZE MECO_FFN_HIDDEN_SIZE MECO_NUM_ATTENTION_HEADS \
        MECO_NUM_QUERY_GROUPS MECO_VOCAB_SIZE MECO_SEQ_LENGTH MECO_GLOBAL_BATCH_SIZE \
        MECO_TRAIN_ITERS MECO_SAVE_INTERVAL MECO_EVAL_INTERVAL MECO_EVAL_ITERS MECO_LOG_INTERVAL \
        NNODES GPUS_PER_NODE MASTER_PORT MECO_TP MECO_PP MECO_CP MECO_MICRO_BATCH_SIZE; do
        [[ ${!name} =~ ^[1-9][0-9]{0,11}$ ]] ||
            refuse "$name=${!name}: not a whole number above 0. Correct or unset the variable."
    done
    for name in MECO_SEED MECO_NUM_WORKERS NODE_RANK; do
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
            refuse "$name=${!name}: not a whole number. Correct or unset the variable."
    done
    for name in MECO_LR MECO_WEIGHT_DECAY MECO_LR_WARMUP_FRACTION MECO_COOLDOWN_FRACTION \
        ${MECO_MIN_LR:+MECO_MIN_LR}; do
        [[ ${!name} =~ ^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$ ]] ||
            refuse "$name=${!name}: not a number. Write it as 0.0005 or 5e-4."
    done
    for name in MECO_CONDITIONING MECO_FP8; do
        [[ ${!name} =~ ^[01]$ ]] || refuse "$name=${!name}: neither 0 nor 1. Give one of them."
    done
    [[ $MECO_TRANSFORMER_IMPL =~ ^(transformer_engine|local)$ ]] ||
        refuse "MECO_TRANSFORMER_IMPL=$MECO_TRANSFORMER_IMPL: give transformer_engine or local."
    ((MECO_FP8 == 0)) || [[ $MECO_TRANSFORMER_IMPL == transformer_engine ]] ||
        refuse "MECO_FP8=1 needs MECO_TRANSFORMER_IMPL=transformer_engine. Drop one of them."
    ((NODE_RANK < NNODES)) ||
        refuse "NODE_RANK=$NODE_RANK: there are NNODES=$NNODES, counted from 0."
    # shellcheck disable=SC2153  # set by set_defaults
    local tp=$MECO_TP pp=$MECO_PP heads=$MECO_NUM_ATTENTION_HEADS groups=$MECO_NUM_QUERY_GROUPS
    ((MECO_HIDDEN_SIZE % heads == 0)) ||
        refuse "MECO_HIDDEN_SIZE=$MECO_HIDDEN_SIZE: not a multiple of" \
            "MECO_NUM_ATTENTION_HEADS=$heads."
    ((heads % groups == 0)) ||
        refuse "MECO_NUM_ATTENTION_HEADS=$heads: not a multiple of MECO_NUM_QUERY_GROUPS=$groups."
    ((groups % tp == 0 && MECO_FFN_HIDDEN_SIZE % tp == 0 && 128 % tp == 0)) ||
        refuse "MECO_TP=$tp: MECO_NUM_QUERY_GROUPS=$groups," \
            "MECO_FFN_HIDDEN_SIZE=$MECO_FFN_HIDDEN_SIZE and 128 must be multiples of it. Give 1," \
            "2, 4 or 8."
    ((MECO_NUM_LAYERS % pp == 0)) ||
        refuse "MECO_PP=$pp: MECO_NUM_LAYERS=$MECO_NUM_LAYERS is not a multiple of it."
    local gpus=$((NNODES * GPUS_PER_NODE))
    # shellcheck disable=SC2153  # set by set_defaults
    local ranks=$((tp * pp * MECO_CP))
    ((gpus % ranks == 0)) ||
        refuse "MECO_TP=$tp, MECO_PP=$pp, MECO_CP=$MECO_CP: NNODES * GPUS_PER_NODE = $gpus GPUs are" \
            "not a multiple of MECO_TP * MECO_PP * MECO_CP."
    local samples=$((MECO_MICRO_BATCH_SIZE * (gpus / ranks)))
    ((MECO_GLOBAL_BATCH_SIZE % samples == 0)) ||
        refuse "MECO_GLOBAL_BATCH_SIZE=$MECO_GLOBAL_BATCH_SIZE: not a multiple of $samples, the" \
            "MECO_MICRO_BATCH_SIZE of all data-parallel ranks together."
}

make_command() {
    local data cooldown
    # Blends are lists; paths with spaces are Megatron's own limit.
    read -r -a data <<<"$MECO_DATA_PATH"
    read -r -a cooldown <<<"$MECO_COOLDOWN_DATA_PATH"
    ((${#data[@]})) || refuse "MECO_DATA_PATH is blank. Give a prepared corpus, or unset it."
    launch=("$MECO_PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node-rank "$NODE_RANK"
        --nproc-per-node "$GPUS_PER_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    local key name value
    flags=()
    for key in "${keys[@]}"; do
        name=$(variable_of "$key")
        value=${preset[$key]}
        if [[ $name ]]; then value=${!name}; fi
        flags+=("--$key")
        if [[ $value != true ]]; then flags+=("$value"); fi
    done
    flags+=(
        --meco --max-position-embeddings "$MECO_SEQ_LENGTH" --min-lr "$MECO_MIN_LR"
        # TP times this stays 128, so that every layout has the same padded vocabulary.
        --make-vocab-size-divisible-by "$((128 / MECO_TP))"
        --data-path "${data[@]}" --data-cache-path "$MECO_DATA_CACHE"
        --tokenizer-model "$MECO_TOKENIZER_MODEL"
        --save "$MECO_OUTPUT/checkpoints" --load "$MECO_OUTPUT/checkpoints"
        --tensorboard-dir "$MECO_OUTPUT/tensorboard"
    )
    if ((${#cooldown[@]})); then flags+=(--meco-cooldown-data-path "${cooldown[@]}"); fi
    if ((MECO_TP > 1)); then flags+=(--sequence-parallel); fi
    if ((MECO_FP8)); then flags+=(--fp8-format hybrid --fp8-recipe "$MECO_FP8_RECIPE"); fi
    # Kernels of Transformer Engine that Megatron would otherwise expect.
    if [[ $MECO_TRANSFORMER_IMPL == local ]]; then
        flags+=(--no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion)
    fi
    flags+=("$@")
}

# One flag with its values on a line, quoted for a shell.
print_command() {
    local word
    printf '%q' "$1"
    for word in "${@:2}"; do
        if [[ $word == --* || $word == "$MECO_TRAIN_SCRIPT" ]]; then printf ' \\\n   '; fi
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

check_names
set_defaults
check_values
if ((MECO_CONDITIONING == 0)); then MECO_TEMPLATE=; fi
if [[ -z ${MECO_MIN_LR:-} ]]; then
    MECO_MIN_LR=$(awk -v lr="$MECO_LR" 'BEGIN { printf "%.6g", lr / 10 }')
fi
if [[ -z ${MECO_OUTPUT:-} ]]; then
    MECO_OUTPUT=runs/llama-$SIZE-meco
    if ((MECO_CONDITIONING == 0)); then MECO_OUTPUT=runs/llama-$SIZE-baseline; fi
fi
if [[ -z ${MECO_PYTHON:-} ]]; then
    MECO_PYTHON=python3
    if [[ -x $root/.venv/bin/python ]]; then MECO_PYTHON=$root/.venv/bin/python; fi
fi
make_command "$@"

# The state of delayed scaling is pickled in checkpoints, which Transformer Engine from 2.18 on reads
# when it is told to: else no run with it could go on. These checkpoints are the run's own.
if ((MECO_FP8)) && [[ $MECO_FP8_RECIPE == delayed ]]; then
    export NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE="${NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE:-1}"
fi
# Megatron asks for it with tensor parallelism on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
command=("${launch[@]}" "$MECO_TRAIN_SCRIPT" "${flags[@]}")
if [[ $dry_run ]]; then
    print_command "${command[@]}"
    exec "$MECO_PYTHON" "$root/examples/estimate_memory.py" --gpus "$((NNODES * GPUS_PER_NODE))" \
        --vocab-size "$MECO_VOCAB_SIZE" -- "${flags[@]}"
fi
exec "${command[@]}"
