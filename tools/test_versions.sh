#!/bin/sh
# Runs tests under other versions of Megatron-Core, each in an environment of its own.
#
#   sh tools/test_versions.sh [VERSION ...]     default: all of $VERSIONS, and main where it is given
#
# From the environment: MEGATRON_MAIN, a checkout of Megatron-LM that is tested as "main"; it is
# copied, never written. Environments are kept in build/versions and made again when the pins
# change; uv links their files to its cache, so each takes little room. Needs .venv (make venv).

set -eu

VERSIONS="0.16.1 0.17.1 0.18.2 0.19.2"

# The data part, then what trains. Each set takes a few minutes, mostly imports.
DATA_TESTS="tests/data/test_dataset.py tests/data/test_packed_batches.py tests/versions/test_samples.py"
TRAINING_TESTS="tests/versions/test_losses.py tests/training/test_leakage.py
    tests/training/test_megatron_flags.py tests/training/test_full_validation.py"
# Of a checkout alone: Megatron's wheel has no tests.
OWN_TESTS=tests/versions/test_megatrons_own.py

say() { printf '%s\n' "versions: $*"; }
die() { printf '%s\n' "versions: error: $*" >&2; exit 1; }

cd "$(dirname "$0")/.."
root=$(pwd -P)
folder=build/versions
uv=$(command -v uv || printf '%s' .venv/bin/uv)
[ -x "$uv" ] && [ -x .venv/bin/python ] || die "no .venv with uv: call make venv"
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
export UV_PYTHON_DOWNLOADS=never

# What the package needs apart from Megatron, and what the chosen tests need.
write_requirements() {
    .venv/bin/python -I -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    needed = tomllib.load(file)["project"]["dependencies"]
tests = ("pytest", "pytest-timeout", "einops", "pybind11", "setuptools")
print(*(n for n in needed if not n.startswith("megatron-core")), *tests, sep="\n")
'
}

# A copy, because building writes into the checkout.
copy_checkout() {
    [ -f "$MEGATRON_MAIN/megatron/core/package_info.py" ] ||
        die "MEGATRON_MAIN=$MEGATRON_MAIN is no checkout of Megatron-LM"
    rm -rf "$1"
    mkdir -p "$1"
    (cd "$MEGATRON_MAIN" && tar cf - megatron pyproject.toml setup.py README.md LICENSE MANIFEST.in) |
        (cd "$1" && tar xf -)
}

# make_environment VERSION: $folder/VERSION/venv
make_environment() {
    here=$folder/$1
    mkdir -p "$here"
    write_requirements >"$here/requirements.txt"
    grep -v '^megatron-core==' constraints.txt >"$here/constraints.txt"
    what="megatron-core[training]==$1"
    stamp=$(cat "$here/requirements.txt" "$here/constraints.txt" .venv/pyvenv.cfg | cksum)
    if [ "$1" = main ]; then
        what=$root/$here/Megatron-LM
        copy_checkout "$what"
        # Every time: the checkout moves.
        stamp="$stamp $(date +%s)"
    fi
    if [ "$(cat "$here/stamp" 2>/dev/null)" = "$stamp" ]; then return; fi
    say "making $here/venv"
    rm -f "$here/stamp"
    "$uv" venv --quiet --clear --python .venv/bin/python "$here/venv"
    # The trainers of some versions need older packages than the pins; their data part does not.
    for wanted in "$what" "${what%%\[*}${what##*\]}"; do
        if "$uv" pip install --quiet --python "$here/venv/bin/python" -c "$here/constraints.txt" \
            -r "$here/requirements.txt" "$wanted" 2>"$here/install.log"; then
            printf '%s' "$stamp" >"$here/stamp"
            return
        fi
        say "$wanted does not go with the pinned packages: $(head -n 2 "$here/install.log")"
    done
    die "no environment for $1"
}

# The trainer counts, not the number. Its source is read: the import takes ten seconds.
trains() {
    grep -q '^def parse_and_validate_args' "$1"/venv/lib/python*/site-packages/megatron/training/arguments.py 2>/dev/null
}

# These ask for the rank of a process that has none when they build a blend into a cache.
needs_a_rank() {
    ! grep -q 'torch.distributed.is_initialized' "$1"/venv/lib/python*/site-packages/megatron/core/datasets/blended_dataset.py
}

chosen=${*:-$VERSIONS${MEGATRON_MAIN:+ main}}
failed=
for version in $chosen; do
    [ "$version" != main ] || [ -n "${MEGATRON_MAIN:-}" ] || die "main needs MEGATRON_MAIN=PATH"
    make_environment "$version"
    python=$root/$folder/$version/venv/bin/python
    tests=$DATA_TESTS
    if trains "$folder/$version"; then tests="$tests $TRAINING_TESTS"; fi
    if needs_a_rank "$folder/$version"; then set -- -p versions.one_rank; else set --; fi
    unset MEGATRON_TESTS
    if [ "$version" = main ]; then
        MEGATRON_TESTS=$(cd "$MEGATRON_MAIN" && pwd -P)/tests/unit_tests/data/test_gpt_dataset.py
        export MEGATRON_TESTS
        tests="$tests $OWN_TESTS"
    fi
    # shellcheck disable=SC2086
    say "$version:" $tests
    # shellcheck disable=SC2086
    PYTHONPATH=$root:$root/tests "$python" -m pytest -q -p no:cacheprovider "$@" $tests ||
        failed="$failed $version"
done
[ -z "$failed" ] || die "tests failed under:$failed"
say "passed under: $chosen"
