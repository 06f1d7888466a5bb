#!/usr/bin/env bash
# Prefill and decode on GPUs of their own, on one machine: needs two GPUs, a transfer engine that SGLang supports (mooncake,
# nixl) and sglang-router. The plugin belongs on prefill; decode is stock SGLang and has no attention backend of ours.
set -euo pipefail
model=${1:-Qwen/Qwen2.5-VL-7B-Instruct}

trap 'kill $(jobs -p)' EXIT
python -m sglang.launch_server --model-path "$model" --disaggregation-mode prefill --port 30000 \
    --attention-backend mminference &
python -m sglang.launch_server --model-path "$model" --disaggregation-mode decode --port 30001 --base-gpu-id 1 &
python -m sglang_router.launch_router --pd-disaggregation --host 0.0.0.0 --port 8000 \
    --prefill http://127.0.0.1:30000 --decode http://127.0.0.1:30001
