#!/usr/bin/env bash
# Makes .venv: the stock SGLang runtime, Mooncake without CUDA, this package
# (editable) and the test tools, at the versions the constraints files name.
# Usage: tools/setup.sh RELEASE. Changes nothing outside the repository but uv's cache.
set -euo pipefail
cd "$(dirname "$0")/.."

release=$1
runtime=sglang_scaling_fixes/lab/constraints/$release.txt
tools=constraints/dev.txt
build=constraints/build.txt

say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# The first interpreter all pinned versions have wheels for; $PYTHON is the only choice if set.
find_python() {
    local name found
    for name in ${PYTHON:-python3 python3.11 python3.12}; do
        found=$("$name" -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 12) and print(sys.executable)' 2>/dev/null) || continue
        if [ -n "$found" ]; then echo "$found"; return; fi
    done
    die "SGLang $release can be installed for CPython 3.11 and 3.12 only, and ${PYTHON:-python3} is$(${PYTHON:-python3} -c 'import platform; print("", platform.python_version())' 2>/dev/null || echo ' not there'): install one of them, or name it with PYTHON=..."
}

# uv from the PATH; else from pip into .cache/uv. `--target` also works where the
# system's Python refuses `pip install` (PEP 668) and where venv is not packaged.
find_uv() {
    if command -v uv; then return; fi
    if [ ! -x .cache/uv/bin/uv ]; then
        say "fetching uv into .cache/uv" >&2
        "$python" -m pip install --quiet --target .cache/uv --constraint "$tools" uv >&2 \
            || die "could not get uv: this needs pip ($python -m pip) and a package index"
    fi
    echo "$PWD/.cache/uv/bin/uv"
}

[ "$(uname -s)" = Linux ] || die "the stock runtime exists for Linux only"
[ -f "$runtime" ] || die "no constraints for SGLang $release ($runtime)"
python=$(find_python)
mkdir -p .cache
exec 9>.cache/setup.lock
flock 9 # one at a time: two `make` may run

# Two keys: new versions need a new .venv, a new pyproject.toml only our package again.
key() { { cat "$@"; echo "$release $python" && "$python" -V; } | sha256sum | cut -c1-16; }
runtime_stamp=.venv/.runtime-$(key "$runtime" "$tools")
package_stamp=.venv/.package-$(key "$runtime" "$tools" "$build" pyproject.toml)
if [ -f "$package_stamp" ]; then exit 0; fi

uv=$(find_uv)
export UV_PYTHON_DOWNLOADS=never VIRTUAL_ENV=$PWD/.venv
if [ ! -f "$runtime_stamp" ]; then
    say "installing SGLang $release for $("$python" -V) into .venv (about 10 GB; minutes on a cold cache)"
    rm -rf .venv
    "$uv" venv --quiet --python "$python" .venv
    "$uv" pip install --quiet --constraint "$runtime" --constraint "$tools" \
        "sglang==$release" mooncake-transfer-engine-non-cuda \
        pytest pytest-xdist hypothesis ruff mypy pip uv sglang-router
    touch "$runtime_stamp"
fi
say "installing this package, editable"
"$uv" pip install --quiet --no-deps --build-constraints "$build" --editable .
rm -f .venv/.package-*
touch "$package_stamp"
say "ready: .venv"
