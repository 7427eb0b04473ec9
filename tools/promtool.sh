#!/usr/bin/env bash
# Prints the path of promtool: the one on the PATH, or else Debian's, unpacked into .cache/promtool
# (nothing is installed). Exit status 1, with the reason, where neither can be had.
set -euo pipefail
cd "$(dirname "$0")/.."

if command -v promtool; then exit 0; fi
folder=$PWD/.cache/promtool
tool=$folder/usr/bin/promtool
if [ ! -x "$tool" ]; then
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || {
        echo "promtool is not here, and this is no Debian to take it from: install Prometheus" >&2
        exit 1
    }
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    chmod 755 "$work"
    cd "$work"
    # A new machine has no package lists yet; only root can fetch them.
    { apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; }; } >&2 || {
        echo "promtool: 'apt-get download prometheus' failed; install Prometheus" >&2
        exit 1
    }
    mkdir -p "$folder"
    dpkg-deb -x prometheus_*.deb "$work/x"
    mkdir -p "$(dirname "$tool")"
    mv "$work/x/usr/bin/promtool" "$tool"
fi
echo "$tool"
