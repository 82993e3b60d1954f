#!/usr/bin/env bash
# GRPO on Qwen3-0.6B on one GPU, FSDP2 and SGLang colocated: a Hugging Face directory in, one out at every checkpoint.
#
#   MODEL=~/Qwen3-0.6B DATA=~/gsm8k.jsonl OUTPUT=runs/qwen3-0.6B scripts/run-qwen3-0.6B-1gpu.sh [more flags of slime]
#
# DATA: lines such as {"prompt": [{"role": "user", "content": "..."}], "label": "42"}. Without a download:
#   python scripts/random_checkpoint.py qwen3-0.6B /tmp/Qwen3-0.6B
(
    set -euo pipefail
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    OUTPUT=${OUTPUT:-runs/qwen3-0.6B}

    "${PYTHON:-python3}" train.py \
        --hf-checkpoint "${MODEL:-$HOME/Qwen3-0.6B}" --save "$OUTPUT" --save-interval 20 \
        --save-hf "$OUTPUT/hf/rollout_{rollout_id}" \
        --prompt-data "${DATA:-$HOME/gsm8k.jsonl}" --input-key prompt --label-key label \
        --apply-chat-template --rollout-shuffle --rm-type math \
        --num-rollout 200 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256 \
        --rollout-max-response-len 1024 --rollout-temperature 1.0 \
        --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --lr 1e-6 \
        --train-backend fsdp --use-dynamic-batch-size --max-tokens-per-gpu 16384 \
        --colocate --actor-num-gpus-per-node 1 --sglang-mem-fraction-static 0.5 "$@"
)
