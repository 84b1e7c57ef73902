#!/bin/sh
# What `make gpu-check` starts: find a Python whose torch sees the GPU, complete it, check.
#
# On a host without a network nothing is fetched: Python packages that are missing come as wheels
# from WHEELS (collect_wheels.sh fetches them elsewhere) and go into build/gpu-check/site, beside that
# Python and not into it; the C++ extension is compiled here. Arguments go to check.py.
set -eu

cd "$(dirname "$0")/../.."
state=build/gpu-check
site=$PWD/$state/site
WHEELS=${WHEELS:-wheels}

say() { printf 'gpu-check: %s\n' "$*" >&2; }
refuse() {
    say "error: $*"
    exit 1
}

rehearse=''
for word in "$@"; do
    case $word in
        --rehearse) rehearse=1 ;;
        --help | -h) exec python3 benchmarks/gpu/check.py --help ;;
    esac
done

# 0: torch sees a GPU. 2: it sees none. Else: no torch there.
probe='import sys, torch; sys.exit(0 if torch.cuda.is_available() else 2)'
chosen='' tried='' without_gpu=''
for python in "${PYTHON:-}" .venv/bin/python python3.12 python3.13 python3; do
    if [ -z "$python" ] || ! command -v "$python" >/dev/null 2>&1; then continue; fi
    status=0
    "$python" -W ignore -c "$probe" >/dev/null 2>&1 || status=$?
    if [ "$status" = 0 ] || { [ "$status" = 2 ] && [ -n "$rehearse" ]; }; then
        chosen=$(command -v "$python")
        break
    fi
    if [ "$status" = 2 ]; then without_gpu="$without_gpu $python"; fi
    tried="$tried $python"
done
if [ -z "$chosen" ]; then
    if [ -n "$without_gpu" ]; then
        refuse "no GPU that torch can see (asked:$without_gpu). Run it on a host with one;" \
            "--rehearse runs everything at toy size on the CPU."
    fi
    refuse "no Python with torch (tried:${tried:- none}). Give PYTHON=/path/to/python, or run" \
        "'make venv' where there is a network."
fi
case $chosen in /*) ;; *) chosen=$PWD/$chosen ;; esac

mkdir -p "$state"
missing() {
    "$chosen" -W ignore - <<'END'
import importlib.util
names = ("megatron.core", "megatron.training", "omegaconf", "transformers", "tokenizers", "pyarrow",
         "tldextract", "rich", "tensorboard", "pytest", "pytest_timeout", "xdist", "pybind11")
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
print(" ".join(name for name in names if not there(name)))
END
}
# Which wheels are there; the folder may have been filled up since the last time.
listing=$(ls "$WHEELS"/*.whl 2>/dev/null || true)
if [ -n "$listing" ] && [ "$listing" != "$(cat "$site.list" 2>/dev/null)" ]; then
    say "installing the wheels of $WHEELS into $state/site"
    rm -rf "$site" "$site.list"
    "$chosen" -m pip install -q --no-index --no-deps --no-compile --target "$site" \
        "$WHEELS"/*.whl >"$state/pip.log" 2>&1 ||
        refuse "pip failed: $(tail -n 1 "$state/pip.log") (see $state/pip.log)"
    printf '%s\n' "$listing" >"$site.list"
fi
if [ -d "$site" ]; then export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"; fi
if [ -n "$(missing)" ]; then
    refuse "$chosen lacks: $(missing). Bring their wheels in WHEELS=$WHEELS" \
        "(benchmarks/gpu/README.md), or run 'make venv' where there is a network."
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$chosen" -W ignore -c 'import megatron_meco._core' >/dev/null 2>&1; then
    say "compiling the C++ extension"
    "$chosen" setup.py -q egg_info build_ext --inplace >"$state/build.log" 2>&1 ||
        refuse "the C++ extension does not compile: $(tail -n 1 "$state/build.log")" \
            "(see $state/build.log)"
fi
exec "$chosen" -W ignore benchmarks/gpu/check.py "$@"
