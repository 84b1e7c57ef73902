#!/bin/sh
# Makes .venv: a Python that really runs, the pinned packages, this package with its C++ extension.
#
# A second call finds the stamp of the first and returns at once; a change in csrc/ compiles the
# extension alone; a change of the pins, of pyproject.toml, of the version, of the interpreter or of
# the folder installs again. The stamp is written last, so an interrupted set-up never counts as whole.
#
# From the environment: PYTHON (tried first), CXX (the C++ compiler), and whatever pip and uv read.

set -eu

say() { printf '%s\n' "setup: $*"; }
die() { printf '%s\n' "setup: error: $*" >&2; exit 1; }

cd "$(dirname "$0")/.."
root=$(pwd -P)
venv=.venv
stamp=$venv/.meco-setup
unfinished=$venv/.meco-unfinished
made_here=$venv/.meco-made-here

# Another environment's modules must not leak into this one, and uv is not to fetch a Python.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
export UV_PYTHON_DOWNLOADS=never UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}"

digest() {
    if command -v sha256sum >/dev/null 2>&1; then sha256sum
    elif command -v shasum >/dev/null 2>&1; then shasum -a 256
    else cksum; fi | cut -d ' ' -f 1
}

# What the installed packages rest on. pyvenv.cfg names the interpreter, $root the place; the version
# is part of what was installed.
environment_digest() {
    { printf '%s\n' "$root"; cat constraints.txt pyproject.toml setup.py tools/setup_venv.sh \
        "$venv/pyvenv.cfg"; grep '^__version__' megatron_meco/__init__.py; } | digest
}

# What the compiled extension rests on; the built file itself is in, should someone delete it.
extension_digest() {
    { cat csrc/*.cpp csrc/*.h; ls megatron_meco/_core.*.so; } 2>/dev/null | digest
}

# Prints "ok VERSION BASE" or "no REASON"; nothing at all when the interpreter does not start.
probe='
import importlib.util, os, sys, sysconfig
version = "%d.%d.%d" % sys.version_info[:3]
if not (3, 12) <= sys.version_info[:2] <= (3, 13):
    print("no it is Python " + version)
elif [m for m in ("ssl", "ctypes", "zlib", "bz2", "venv") if importlib.util.find_spec(m) is None]:
    print("no it lacks the standard modules ssl, ctypes, zlib, bz2 or venv")
elif importlib.util.find_spec("ensurepip") is None and not os.environ.get("SETUP_UV"):
    print("no it cannot make an environment (on Debian and Ubuntu: install python3-venv)")
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("no it has no Python.h (on Debian and Ubuntu: install python3-dev)")
else:
    import ctypes, ssl
    print("ok %s %s" % (version, sys.base_prefix))
'

# The shims of version managers stand on PATH and fail when run: only an answer counts.
ask() { "$1" -I -c "$probe" 2>/dev/null </dev/null || true; }

candidates() {
    for version in 3.12 3.13; do
        printf '%s\n' "python$version"
        # Where version managers, package managers and installers keep interpreters off PATH.
        if command -v pyenv >/dev/null 2>&1; then
            pyenv versions --bare 2>/dev/null | grep "^$version" | while read -r name; do
                printf '%s\n' "$(pyenv prefix "$name" 2>/dev/null)/bin/python"
            done
        fi
        for place in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin \
            "$HOME"/.local/share/uv/python/cpython-"$version"*/bin \
            "$HOME"/.asdf/installs/python/"$version"*/bin \
            "$HOME"/.local/share/mise/installs/python/"$version"*/bin \
            "$HOME"/miniconda3/bin "$HOME"/miniforge3/bin "$HOME"/anaconda3/bin /opt/conda/bin \
            "$HOME"/.local/bin /usr/local/bin /usr/bin /opt/python/"$version"*/bin \
            /opt/homebrew/bin; do
            if [ -x "$place/python$version" ]; then printf '%s\n' "$place/python$version"; fi
        done
    done
    printf '%s\n' python3 python
}

find_python() {
    python=
    reason="none was found"
    if [ -n "${PYTHON:-}" ]; then
        answer=$(ask "$PYTHON")
        case $answer in
            ok*) python=$PYTHON; return ;;
            no*) say "PYTHON=$PYTHON is not used: ${answer#no }" ;;
            *) say "PYTHON=$PYTHON is not used: it does not run" ;;
        esac
    fi
    list=$(candidates)
    old_ifs=$IFS
    IFS='
'
    for candidate in $list; do
        answer=$(ask "$candidate")
        case $answer in
            ok*) python=$candidate; break ;;
            "no it is Python"*) ;;
            no*) reason="$candidate: ${answer#no }" ;;
        esac
    done
    IFS=$old_ifs
    [ -n "$python" ] || die "Python 3.12 or 3.13 is needed and $reason." \
        "Install one, or name one: make venv PYTHON=/path/to/python3.12"
}

# A compiler counts when it compiles: names on PATH may be broken, and headers may be missing.
find_compiler() {
    work=$(mktemp -d)
    printf '#include <vector>\nint main() { return std::vector<int>(0).size(); }\n' >"$work/a.cpp"
    for compiler in "${CXX:-}" g++ c++ clang++; do
        # Unquoted on purpose: CXX may hold options or a cache in front ("ccache g++").
        # shellcheck disable=SC2086
        if [ -n "$compiler" ] && $compiler -std=c++17 -o "$work/a" "$work/a.cpp" 2>/dev/null; then
            rm -rf "$work"
            export CXX="$compiler"
            return
        fi
    done
    rm -rf "$work"
    die "a C++17 compiler is needed and none works (tried \$CXX, g++, c++, clang++)." \
        "Install g++ (Debian and Ubuntu: apt-get install g++) or set CXX."
}

# Installs with uv; where only pip knows the way (mirrors in pip.conf), with pip.
install() {
    if [ -n "$uv" ] && "$uv" pip install --python "$venv/bin/python" "$@"; then return 0; fi
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || return 1
    if [ -n "$uv" ]; then say "uv could not install; trying pip"; fi
    "$venv/bin/python" -m pip install --disable-pip-version-check "$@"
}

# pip cannot read dependencies out of pyproject.toml without building the package.
write_requirements() {
    "$venv/bin/python" -I -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")
'
}

# Imports what is named. -I keeps the source folder off sys.path, which would hide a package that
# was not installed, and ignores PYTHONDONTWRITEBYTECODE: Megatron takes twenty seconds to import
# uncompiled, and every rank of every test imports it. What third parties print on the way is shown
# only where the import fails.
check_import() {
    "$venv/bin/python" -I -W ignore -c "import $1" >build/import.log 2>&1 || {
        cat build/import.log >&2
        die "the finished environment cannot import all of: $1"
    }
}

# Only what this script made is ever deleted.
start_afresh() {
    [ -e "$made_here" ] ||
        die "$*. It was not made by this set-up: remove or rename it and call again."
    say "$*: starting afresh"
    rm -rf "$venv"
}

# Three lines: what the environment rests on, what the extension rests on, where it was made.
write_stamp() {
    printf '%s\n' "$environment" "$1" "$root" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

compile_only() {
    say "the C++ sources changed: compiling the extension"
    "$venv/bin/python" setup.py --quiet build_ext --inplace --force ||
        die "the C++ extension does not compile; the compiler's messages are above"
}

# ---- What is there already? ----

is_current() {
    [ -f "$stamp" ] && [ ! -e "$unfinished" ] && [ -x "$venv/bin/python" ] || return 1
    [ "$(sed -n 1p "$stamp")" = "$(environment_digest)" ] || return 1
    "$venv/bin/python" -I -S -c '' 2>/dev/null || return 1
    # An interpreter asked for by name is honoured, also when an environment stands already.
    if [ -n "${PYTHON:-}" ]; then
        wanted=$(ask "$PYTHON")
        case $wanted in
            ok*) [ "$wanted" = "$(ask "$venv/bin/python")" ] || return 1 ;;
        esac
    fi
}

SETUP_UV=$(command -v uv 2>/dev/null || true)
# A shim that fails when run is no uv.
if [ -n "$SETUP_UV" ] && ! "$SETUP_UV" --version >/dev/null 2>&1; then SETUP_UV=; fi
export SETUP_UV

if is_current && [ "$(sed -n 2p "$stamp")" = "$(extension_digest)" ]; then exit 0; fi

for file in constraints.txt pyproject.toml setup.py csrc/bindings.cpp; do
    [ -f "$file" ] || die "$file is missing: the checkout is not whole"
done
mkdir -p build
# Two calls at once (make demo and make test in two windows) take turns.
if command -v flock >/dev/null 2>&1; then
    exec 9>build/setup.lock
    flock -n 9 || { say "another set-up of this folder is running; waiting for it"; flock 9; }
    if is_current && [ "$(sed -n 2p "$stamp")" = "$(extension_digest)" ]; then exit 0; fi
fi
trap 'say "interrupted; the next call goes on safely" >&2; exit 130' INT TERM HUP
find_compiler

if is_current; then
    # Whatever happens to the compilation, the packages need not be installed again.
    environment=$(environment_digest)
    write_stamp "not compiled"
    compile_only
else
    # Packages that an interruption left half unpacked look whole to an installer.
    again=
    if [ -e "$unfinished" ] && [ -e "$made_here" ]; then
        start_afresh "the last set-up was interrupted"
    elif [ -e "$unfinished" ]; then
        say "the last set-up was interrupted: installing every package again"
        again=--force-reinstall
    elif [ -f "$stamp" ] && [ "$(sed -n 3p "$stamp")" != "$root" ]; then
        start_afresh "$venv was made in another folder"
    fi
    # An environment that a user made is kept when its Python will do.
    present=$(ask "$venv/bin/python")
    python=$venv/bin/python
    answer=$present
    case ${PYTHON:+asked}$present in
        ok*) ;;
        *)
            find_python
            answer=$(ask "$python")
            if [ -e "$venv" ] && [ "$present" != "$answer" ]; then
                start_afresh "$venv has another Python or none that will do"
            fi
            ;;
    esac
    say "Python ${answer#ok } ($python), C++ compiler $CXX"
    rm -f "$stamp"

    if [ ! -x "$venv/bin/python" ]; then
        say "making $venv"
        mkdir -p "$venv"
        : >"$made_here"
        : >"$unfinished"
        if "$python" -c 'import ensurepip' 2>/dev/null; then
            "$python" -m venv "$venv" || die "$python -m venv failed; the lines above say why"
        else
            "$SETUP_UV" venv --quiet --seed --allow-existing --python "$python" "$venv" ||
                die "uv venv failed; the lines above say why"
        fi
    fi
    : >"$unfinished"

    uv=$SETUP_UV
    if [ -z "$uv" ]; then
        # Environments made by other tools come without pip.
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
            "$venv/bin/python" -m ensurepip >/dev/null 2>&1 || true
        say "installing uv into $venv"
        if "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            -c constraints.txt uv; then uv=$venv/bin/uv
        else say "uv could not be installed; going on with pip, which is slower"; fi
    fi

    free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
    if [ "${free_kib:-9999999}" -lt 8000000 ]; then
        say "warning: $((free_kib / 1024)) MiB are free here and about 6 GiB are needed"
    fi
    say "installing the pinned packages (up to 3 GB to download, about 6 GiB on disk)"
    write_requirements >build/requirements.txt
    # shellcheck disable=SC2086
    install $again -c constraints.txt -r build/requirements.txt ||
        die "the pinned packages could not be installed (network, package index or disk space;" \
            "the lines above say which). Call this again when it is mended."

    # From here on an interruption leaves whole packages behind, which need no second installation.
    rm -f "$unfinished"

    say "compiling the C++ extension and installing megatron-meco"
    install --no-deps --no-build-isolation --editable . ||
        die "megatron-meco could not be built; the compiler's messages are above"
    environment=$(environment_digest)

    say "checking: the first import of torch and Megatron compiles them, which takes a while"
    check_import "megatron.core, megatron.training, transformers, matplotlib.pyplot"
fi

check_import "megatron_meco._core"
write_stamp "$(extension_digest)"
say "ready: $venv/bin/python"
