#!/bin/sh
# Collects the wheels that `make gpu-check` (run.sh) installs on a GPU host without a network.
#
#   sh benchmarks/gpu/collect_wheels.sh [--transformer-engine] [DIR=wheels]
#
# Run it on any x86-64 Linux machine with a network and Python 3.12 (with pip), then carry DIR to the
# host. Without the option: 4 wheels, 3 MB, seconds. With it also Transformer Engine: 14 wheels,
# 280 MB. Its PyTorch half comes as source and is compiled here against the host's version of
# PyTorch: a quarter of an hour on 2 cores, 3 GB to download and 7 GB on disk meanwhile; it needs a
# C++17 compiler, Python.h and the module venv, but no CUDA and no GPU. What is compiled here wants a
# C library on the host that is not much older than the one here (built on Debian 12: glibc 2.34).
#
# What is in DIR already is neither fetched nor built again; a wheel appears there whole or not at
# all. It works in build/collect-wheels, where logs stay; what is big there goes when all is done.
#
# From the environment: PYTHON, TORCH_VERSION (the host's), TE_VERSION, MAX_JOBS (compilers at once),
# CXX, and whatever pip reads. The other versions are those of constraints.txt.
set -eu

TORCH_VERSION=${TORCH_VERSION:-2.11.0}
TE_VERSION=${TE_VERSION:-2.20.2}

say() { printf 'collect-wheels: %s\n' "$*" >&2; }
refuse() {
    say "error: $*"
    exit 1
}

engine='' dir=''
for word in "$@"; do
    case $word in
        --transformer-engine) engine=1 ;;
        --help | -h) exec sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0" ;;
        -*) refuse "unknown option $word (there is --transformer-engine)" ;;
        '') refuse "the folder's name is empty" ;;
        *)
            [ -z "$dir" ] || refuse "one folder, not two: $dir and $word"
            case $word in /*) dir=$word ;; *) dir=$PWD/$word ;; esac
            ;;
    esac
done
# Another environment's modules must not leak into the build.
unset PYTHONPATH PYTHONHOME
cd "$(dirname "$0")/../.."
dir=${dir:-$PWD/wheels}
work=$PWD/build/collect-wheels
[ -f constraints.txt ] || refuse "constraints.txt is missing: the checkout is not whole"

# ---- What is there, what is wanted? ----

as_file() { printf %s "$1" | tr - _; }
pinned() { sed -n "s/^$1==//p" constraints.txt; }

# Prints the wheels of a package in the folder, of any version.
present() { (cd "$dir" && ls "$(as_file "$1")"-[0-9]*.whl) 2>/dev/null || true; }

# Whether the package is there. pip would not install two versions of one, so another one is an error.
# $2 is the version, for a compiled wheel followed by the build tag that says against which torch.
have() {
    found=$(present "$1")
    case $found in
        '') return 1 ;;
        "$(as_file "$1")-$2"-*.whl) [ "$(printf '%s\n' "$found" | wc -l)" -gt 1 ] || return 0 ;;
    esac
    refuse "$dir holds $(printf %s "$found" | tr '\n' ' ') where $1 $2 belongs:" \
        "remove what is not wanted"
}

# What a host with PyTorch lacks. For pydantic that includes a typing-extensions that is new enough.
packages='megatron-core omegaconf tldextract requests-file'
if [ -n "$engine" ]; then
    packages="$packages transformer-engine transformer-engine-cu13 nvdlfw-inspect nvidia-cudnn-frontend
        pydantic pydantic-core annotated-types typing-inspection typing-extensions"
fi
fetch=''
for name in $packages; do
    case $name in transformer-engine*) version=$TE_VERSION ;; *) version=$(pinned "$name") ;; esac
    [ -n "$version" ] || refuse "constraints.txt has no version of $name"
    have "$name" "$version" || fetch="$fetch $name==$version"
done
build='' tag=0torch$TORCH_VERSION
if [ -n "$engine" ] && ! have transformer-engine-torch "$TE_VERSION-$tag"; then build=1; fi
if [ -z "$fetch$build" ]; then
    say "nothing to do: $dir has everything"
    exit 0
fi

# ---- Can it be done here? ----

# The shims of version managers stand on PATH and fail when run: only an answer counts.
probe='import sys, platform as p; print(p.system(), p.machine(), "%d.%d" % sys.version_info[:2])'
ask() { "$1" -I -c "$probe" 2>/dev/null </dev/null || true; }
wanted='Linux x86_64 3.12'
if [ -n "${PYTHON:-}" ]; then
    answer=$(ask "$PYTHON")
    [ -n "$answer" ] || refuse "PYTHON=$PYTHON does not run"
    [ "$answer" = "$wanted" ] || refuse "PYTHON=$PYTHON is for '$answer', not for '$wanted'"
    python=$PYTHON
else
    python=''
    for candidate in python3.12 .venv/bin/python; do
        if [ "$(ask "$candidate")" = "$wanted" ]; then python=$candidate && break; fi
    done
    [ -n "$python" ] || refuse "no Python for '$wanted' (tried: python3.12 .venv/bin/python)." \
        "Give PYTHON=/path/to/python3.12"
fi
"$python" -m pip --version >/dev/null 2>&1 || refuse "$python has no pip"

if [ -n "$build" ]; then
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        refuse "$python cannot make environments (Debian and Ubuntu: install python3.12-venv)"
    "$python" -I -c 'import os, sysconfig as s
raise SystemExit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
        refuse "$python has no Python.h (Debian and Ubuntu: install python3.12-dev)"
    # Unquoted on purpose: CXX may hold options or a cache in front ("ccache g++").
    # shellcheck disable=SC2086
    echo '#include <optional>' | ${CXX:-c++} -std=c++17 -fsyntax-only -x c++ - 2>/dev/null ||
        refuse "no C++17 compiler: '${CXX:-c++}' does not work. Install g++ or set CXX"
fi

for folder in "$dir" "$work/tmp"; do
    { mkdir -p "$folder" && [ -w "$folder" ]; } 2>/dev/null ||
        refuse "$folder cannot be made or written to"
done
if command -v flock >/dev/null 2>&1; then
    exec 9>"$work/lock"
    flock -n 9 || refuse "another run is at work in $work"
fi
trap 'rm -rf "$dir/.part" "$work/new" "$work/tmp"' EXIT
trap 'say "interrupted; the next call goes on"; exit 130' INT TERM HUP
# pip unpacks gigabytes, which the usual place is often too small for.
export TMPDIR="$work/tmp" PIP_DISABLE_PIP_VERSION_CHECK=1

# The first line that names an error (less pip's list of all versions), else the last line.
why() {
    { grep -i 'error:' "$1" | grep -v -m 1 'Could not find a version' || tail -n 1 "$1"; } |
        cut -c 1-300
}

# Moves the one wheel in $work/new into the folder; the last step is a rename within it.
deliver() {
    for wheel in "$work"/new/*.whl; do
        cp "$wheel" "$dir/.part" || refuse "$dir is full or cannot be written to"
        mv "$dir/.part" "$dir/${wheel##*/}"
        say "$dir/${wheel##*/}"
    done
    rm -rf "$work/new"
}

# ---- Fetch ----

# The C library that CUDA 13's own wheels ask for: not what happens to be here, which may be newer.
for requirement in $fetch; do
    rm -rf "$work/new"
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d "$work/new" "$requirement" >"$work/fetch.log" 2>&1 ||
        refuse "$requirement cannot be fetched (is there a network?): $(why "$work/fetch.log")"
    deliver
done

# ---- Build ----

if [ -n "$build" ]; then
    env=$work/torch-$TORCH_VERSION
    # Packages that an interruption left half unpacked look whole to pip, hence the stamp.
    if [ ! -f "$env/.whole" ]; then
        free_kib=$(df -Pk "$work" | awk 'NR == 2 { print $4 }')
        [ "${free_kib:-99999999}" -gt 8000000 ] ||
            refuse "$((free_kib / 1024)) MiB are free in $work and about 8000 are needed"
        say "installing torch $TORCH_VERSION to build against (3 GB to download)"
        rm -rf "$env"
        "$python" -m venv "$env" >"$work/torch.log" 2>&1 ||
            refuse "no environment could be made: $(why "$work/torch.log") (see $work/torch.log)"
        # torch brings CUDA's libraries and most of its headers. Those of cccl and crt it leaves out;
        # of nvcc only the version is asked, which a CUDA that is installed here would answer wrongly.
        "$env/bin/python" -m pip install "torch==$TORCH_VERSION" 'cuda-toolkit[cccl,crt,nvcc]' \
            "packaging==$(pinned packaging)" setuptools wheel ninja >>"$work/torch.log" 2>&1 ||
            refuse "torch $TORCH_VERSION cannot be installed: $(why "$work/torch.log")" \
                "(see $work/torch.log)"
        : >"$env/.whole"
    fi
    cuda=$("$env/bin/python" -W ignore -c 'import torch; print(torch.version.cuda)') ||
        refuse "torch $TORCH_VERSION cannot be imported; the lines above say why"
    case $cuda in 13.*) ;; *) refuse "torch $TORCH_VERSION is here for CUDA $cuda, not for 13" ;; esac
    CUDA_HOME=$("$env/bin/python" -c 'import sysconfig as s; print(s.get_path("purelib"))')/nvidia/cu13
    [ -x "$CUDA_HOME/bin/nvcc" ] || refuse "no nvcc in $CUDA_HOME: NVIDIA's packages have changed"

    # A compiler takes up to 2.7 GB.
    jobs=$(awk -v cores="$(nproc)" '/^MemAvailable/ { fit = int($2 / 2800000) }
        END { print fit < 1 ? 1 : fit < cores ? fit : cores }' /proc/meminfo)
    MAX_JOBS=${MAX_JOBS:-$jobs}
    # Headers from NVIDIA's wheels only; compile and do not try downloads of the project's own; do not
    # add the commit of the git checkout around (this one) to the version.
    export MAX_JOBS CUDA_HOME NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE \
        NVTE_NO_LOCAL_VERSION=1
    export PATH="$env/bin:$PATH"
    say "compiling transformer_engine_torch $TE_VERSION, $MAX_JOBS at once" \
        "(a quarter of an hour on 2 cores; log: $work/build.log)"
    rm -rf "$work/new"
    "$env/bin/python" -m pip wheel -v --no-deps --no-build-isolation --no-cache-dir \
        --no-binary transformer-engine-torch --config-settings="--build-option=--build-number=$tag" \
        -w "$work/new" "transformer-engine-torch==$TE_VERSION" >"$work/build.log" 2>&1 ||
        refuse "transformer_engine_torch $TE_VERSION does not build: $(why "$work/build.log")" \
            "(see $work/build.log)"
    deliver
    have transformer-engine-torch "$TE_VERSION-$tag" ||
        refuse "the build left no transformer_engine_torch wheel (see $work/build.log)"
fi
[ -z "$build" ] || rm -rf "$work"/torch-*
say "done: $(find "$dir" -name '*.whl' | wc -l) wheels in $dir"
