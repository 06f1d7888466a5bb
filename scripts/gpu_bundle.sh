#!/usr/bin/env bash
# Packs what `make gpu-report` needs on a machine with CUDA, Python 3.12, PyTorch 2.11 and no network, in three folders
# that can be carried one by one: `kernels` is enough for all steps but serving, which needs `server` and `packages` too.
#
#     scripts/gpu_bundle.sh [--list] [FOLDER]      FOLDER is dist/gpu-bundle by default
#     FOLDER/install.sh TARGET                     there: installs what lies beside it, and says how to go on
#
# --list only tells what is packed, with its size once it is there. Run `make venv` first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly python=.venv/bin/python
readonly limit=64000000
# What this package and its tests import beyond what comes with PyTorch, JAX or transformers (httpx, numpy, rich, typer
# and the like). Without a version: that of requirements/dev.txt.
readonly kernels=(attrs iniconfig jsonschema jsonschema-specifications pluggy pytest referencing rpds-py)
# The last SGLang on PyTorch 2.11, and what it pins; CUDA libraries and PyTorch are the machine's.
readonly server=(sglang==0.5.17 flashinfer-python==0.6.15.post1 sglang-kernel==0.4.5 tokenizers==0.22.2)
# What a server imports beyond that.
readonly packages=(transformers==5.12.1 apache-tvm-ffi==0.1.11 xgrammar==0.2.1 openai==2.6.1 soundfile==0.13.1
    decord==0.6.0 annotated-types asttokens cffi compressed-tensors dill distro executing fastapi gguf ipython jedi jiter
    loguru matplotlib-inline msgspec opentelemetry-api orjson parso partial-json-parser pexpect prompt-toolkit ptyprocess
    pure-eval pybase64 pycparser pydantic pydantic-core pydantic-extra-types python-multipart pyzmq setproctitle sniffio
    stack-data starlette traitlets typing-inspection uvicorn wcwidth)
# Parts of wheels that nothing here uses: libraries for other devices and models, and what one links against.
readonly cut=(sgl_kernel/flash_ops sgl_kernel/infllm_ops sgl_kernel/flashmla_ops sgl_kernel/sm100/ xgrammar/lib/)

fail() {
    printf 'gpu_bundle: %s\n' "$*" >&2
    exit 1
}

# wanted: a line for everything that is packed, its part and requirement.
wanted() {
    local part name found
    printf 'kernels %s\n' mminference-sgl checkout
    for part in kernels server packages; do
        local -n names=$part
        for name in "${names[@]}"; do
            found=$(sed -n "s/^$name\(==[^ ;]*\).*/\1/p" requirements/dev.txt)
            case $name in *==*) found= ;; *) [ -n "$found" ] || fail "requirements/dev.txt has no $name" ;; esac
            printf '%s %s\n' "$part" "$name$found"
        done
    done
}

# file PART REQUIREMENT: the file that holds it, or nothing.
file() {
    local name=${2/==/-}
    find "$folder/$1" -iname "${name//-/[-_]}[-.]*" -type f 2> /dev/null | head -n 1 || true
}

# table: part, requirement and bytes of everything, and sums.
table() {
    local part requirement path
    while read -r part requirement; do
        path=$(file "$part" "$requirement")
        printf '%-8s %-36s %12s\n' "$part" "$requirement" "$([ -z "$path" ] || stat -c %s "$path")"
    done <<< "$requirements" | sort -k1,1 -k3,3nr |
        awk '{print; sum[$1] += $3} END {for (part in sum) printf "%-8s %-36s %12d\n", part, "in all", sum[part]}'
}

download() {
    local flags=(--quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp) glibc
    for glibc in 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do
        flags+=(--platform "manylinux_${glibc}_x86_64")
    done
    flags+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
    "$python" -m pip download --disable-pip-version-check "${flags[@]}" --dest "$folder/$1" "${@:2}"
}

# cut_wheels: the wheels that have any of it without what `cut` names.
cut_wheels() {
    "$python" - "$folder" "${cut[@]}" <<'EOF'
import sys, zipfile
from pathlib import Path

folder, *cut = sys.argv[1:]
for path in Path(folder).glob("*/*.whl"):
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if not name.startswith(tuple(cut))]
        if len(names) == len(wheel.namelist()):
            continue
        smaller = path.with_suffix(".part")
        with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as rest:
            for name in names:
                rest.writestr(name, wheel.read(name))
    smaller.replace(path)
EOF
}

write_installer() {
    cat > "$folder/install.sh" <<'EOF'
#!/bin/sh
# install.sh TARGET: installs the parts that are beside it there; PYTHON chooses the interpreter.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
target=$(cd "$1" && pwd)
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$target/site" "$here"/*/*.whl
[ ! -f "$here/kernels/checkout.tar.gz" ] || tar -xzf "$here/kernels/checkout.tar.gz" -C "$target"
echo "cd $target && PYTHONPATH=$target/site $python -m benchmarks.gpu.first_hour --output report"
EOF
    chmod +x "$folder/install.sh"
}

only_list=
[ "${1:-}" != --list ] || { only_list=1 && shift; }
folder=${1:-dist/gpu-bundle}
requirements=$(wanted)
if [ -n "$only_list" ]; then
    table
    exit
fi
[ -x "$python" ] || fail "needs .venv: make venv"
mkdir -p "$folder/kernels" "$folder/server" "$folder/packages"
rm -f "$folder"/*/mminference_sgl-*.whl
"$python" -m maturin build --quiet --release --out "$folder/kernels" > /dev/null
git archive --format=tar.gz -o "$folder/kernels/checkout.tar.gz" HEAD Makefile pyproject.toml benchmarks kernels tests \
    ':(exclude)benchmarks/toy/checkpoint/*.safetensors'
for part in kernels server packages; do
    missing=()
    while read -r own requirement; do
        [ "$own" != "$part" ] || [ -n "$(file "$part" "$requirement")" ] || missing+=("$requirement")
    done <<< "$requirements"
    [ ${#missing[@]} = 0 ] || download "$part" "${missing[@]}"
done
# Wheels of versions that are wanted no longer.
find "$folder" -name '*.whl' | grep -vxF "$(while read -r part requirement; do file "$part" "$requirement"; done <<< "$requirements")" |
    xargs -r rm || true
cut_wheels
write_installer
table
while read -r part _ _ size; do
    [ "$size" -lt "$limit" ] || fail "$part has $size bytes, more than $limit"
done < <(table | grep 'in all')
