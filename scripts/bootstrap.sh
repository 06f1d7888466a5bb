#!/usr/bin/env bash
# Brings .venv to the state that this checkout needs: interpreter, packages, FFmpeg, the built extension.
# Each step leaves a stamp of what it was made from and is skipped while that is unchanged, so a second
# run takes a second or two. Python code is installed editable: only the extension is ever rebuilt.
#
# PYTHON=/path/to/python3.x chooses the interpreter that .venv is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv
readonly python=$venv/bin/python
readonly stamps=$venv/.bootstrap
readonly platform=python/mminference-sgl-cpu
readonly uv_version=0.13.8

say() { printf 'bootstrap: %s\n' "$*" >&2; }
fail() {
    say "$@"
    exit 1
}

is_root() { [ "$(id -u)" = 0 ]; }

apt_install() {
    say "installing $* with apt-get"
    DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2 &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2 < /dev/null
}

can_apt() { is_root && command -v apt-get > /dev/null; }

# stamped NAME HASH: whether step NAME was last done for HASH.
stamped() { [ -f "$stamps/$1" ] && [ "$(cat "$stamps/$1")" = "$2" ]; }
stamp() {
    mkdir -p "$stamps"
    printf '%s\n' "$2" > "$stamps/$1"
}

hash_files() { sha256sum "$@" | sha256sum | cut -d ' ' -f 1; }

# SGLang's pinned release has wheels for these versions.
is_usable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' > /dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && is_usable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 found; install one (Debian: apt-get install python3 python3-venv) or set PYTHON"
}

make_venv() {
    local base version
    base=$(find_python)
    if ! "$base" -c 'import ensurepip, venv' > /dev/null 2>&1; then
        version=$("$base" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        can_apt && apt_install "$version" ||
            fail "$base has no venv module; install it (Debian: apt-get install $version)"
    fi
    say "making $venv with $base"
    # What is there cannot run (see the caller), so nothing of it can be used.
    "$base" -m venv --clear "$venv"
}

install_uv() {
    [ "$("$venv/bin/uv" --version 2> /dev/null | cut -d ' ' -f 2)" = "$uv_version" ] && return
    "$python" -m pip --version > /dev/null 2>&1 || "$python" -m ensurepip > /dev/null ||
        fail "$venv has no pip and cannot get one; remove $venv and run this again"
    "$python" -m pip install --quiet --disable-pip-version-check --force-reinstall "uv==$uv_version"
}

install_packages() {
    local wanted
    wanted=$(hash_files requirements/dev.txt requirements/media.txt)
    stamped packages "$wanted" && return
    say "installing SGLang and the tools (about 11 GB, some minutes the first time)"
    install_uv
    "$venv/bin/uv" pip install --python "$python" --quiet -r requirements/dev.txt
    "$venv/bin/uv" pip install --python "$python" --quiet --no-deps -r requirements/media.txt
    stamp packages "$wanted"
}

has_ffmpeg() {
    "$python" -c 'import sys; from ctypes.util import find_library as find
names = "avcodec avdevice avfilter avformat avutil swresample swscale".split()
sys.exit(not all(map(find, names)))'
}

require_ffmpeg() {
    has_ffmpeg && return
    if can_apt; then
        apt_install ffmpeg || say "apt-get could not install ffmpeg"
    fi
    has_ffmpeg || fail "FFmpeg's shared libraries (libavcodec and its siblings, version 4 to 8) are missing:" \
        "videos cannot be decoded without them. Install them (Debian: apt-get install ffmpeg) and run this again"
}

require_rust() {
    command -v cargo > /dev/null ||
        fail "no Rust toolchain found (cargo is not on PATH); install Rust, stable channel, with rustup or your distribution"
    command -v cc > /dev/null ||
        fail "no C linker found (cc is not on PATH); install one (Debian: apt-get install gcc libc6-dev)"
}

build_extension() {
    local sources made_from
    mapfile -d '' -t sources < <(find rust Cargo.toml Cargo.lock pyproject.toml "$platform/pyproject.toml" -type f -print0 | sort -z)
    made_from=$(hash_files "${sources[@]}")
    if stamped extension "$made_from" &&
        "$python" -c 'import mminference_sgl._core' > /dev/null 2>&1; then
        return
    fi
    require_rust
    say "building the extension"
    install_uv
    "$venv/bin/uv" pip install --python "$python" --quiet --no-deps --no-build-isolation --editable .
    "$venv/bin/uv" pip install --python "$python" --quiet --no-deps "./$platform"
    "$python" -c 'import mminference_sgl._core'
    stamp extension "$made_from"
}

is_usable "$python" || make_venv
install_packages
require_ffmpeg
build_extension
