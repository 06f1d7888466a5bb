#!/usr/bin/env bash
# Tests this checkout with the oldest SGLang that pyproject.toml allows, in an environment of its own, .venv-oldest.
# Packages are hard links into uv's cache. Arguments go to pytest, in place of the tests below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv-oldest
readonly python=$venv/bin/python
readonly uv=.venv/bin/uv
oldest=$(sed -n 's/.*"sglang>=\([0-9.]*\),.*/\1/p' pyproject.toml)
made_from="sglang==$oldest $(sha256sum pyproject.toml python/mminference-sgl-cpu/pyproject.toml | sha256sum)"

if [ "$(cat "$venv/.made-from" 2> /dev/null)" != "$made_from" ]; then
    echo "oldest: making $venv with sglang==$oldest" >&2
    "$uv" venv --quiet --clear --python .venv/bin/python "$venv"
    "$uv" pip install --quiet --python "$python" "sglang==$oldest" httpx hypothesis jsonschema matplotlib maturin pytest rich typer
    "$uv" pip install --quiet --python "$python" --no-deps -r requirements/media.txt
    # The extension is built against the stable ABI: both environments read the one in this tree.
    PATH="$PWD/$venv/bin:$PATH" "$uv" pip install --quiet --python "$python" --no-deps --no-build-isolation --editable .
    "$uv" pip install --quiet --python "$python" --no-deps ./python/mminference-sgl-cpu
    printf '%s\n' "$made_from" > "$venv/.made-from"
fi

if [ $# = 0 ]; then
    set -- tests/planner tests/method tests/backend/test_layout_cache.py tests/backend/test_geometry.py \
        tests/backend/test_geometry_fallbacks.py tests/backend/test_samples.py tests/backend/test_metrics.py
fi
# The CPU platform needs a newer SGLang, and what a release imports may warn of anything.
SGLANG_PLATFORM= exec "$python" -m pytest -o filterwarnings= "$@"
