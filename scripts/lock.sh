#!/usr/bin/env bash
# Resolves requirements/dev.in into requirements/dev.txt; keeps the versions that are there where it can.
# Arguments go to `uv pip compile`, for example `--upgrade-package pytest`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

resolved=$(mktemp)
trap 'rm -f "$resolved"' EXIT
cp requirements/dev.txt "$resolved"
.venv/bin/uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_34 \
    --no-annotate --no-header "$@" --output-file "$resolved" requirements/dev.in > /dev/null
{
    echo "# dev.in resolved for Python 3.11 on x86-64 Linux; written by scripts/lock.sh."
    cat "$resolved"
} > requirements/dev.txt
