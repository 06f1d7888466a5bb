#!/usr/bin/env bash
# Tensor parallelism over two machines of eight GPUs: run with the rank, 0 or 1, and the address of the first machine.
# MMINFERENCE_* has to be the same on both; every rank selects for its own heads.
set -euo pipefail
rank=$1
address=$2

python -m sglang.launch_server --model-path "${3:-Qwen/Qwen3-VL-235B-A22B-Instruct}" --attention-backend mminference \
    --tp 16 --nnodes 2 --node-rank "$rank" --dist-init-addr "$address:20000"
