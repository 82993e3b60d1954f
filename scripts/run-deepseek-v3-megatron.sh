#!/usr/bin/env bash
# GRPO on DeepSeek-V3 with Megatron and SGLang colocated on 16 nodes of 8 GPUs.
#
#   MODEL=/shared/DeepSeek-V3-bf16 DATA=/shared/dapo-math-17k.jsonl OUTPUT=/shared/runs/deepseek-v3 \
#       scripts/run-deepseek-v3-megatron.sh [more flags of slime]
#
# MODEL: weights in bfloat16; published ones are FP8 and are refused. Run it where the Ray cluster of all nodes is (RAY_ADDRESS).
# Its flags are checked by --dry-run; it was not run at this size.
(
    set -euo pipefail
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    OUTPUT=${OUTPUT:-runs/deepseek-v3}
    source scripts/models/deepseek-v3.sh

    PARALLEL=(
        --actor-num-nodes 16 --actor-num-gpus-per-node 8 --colocate
        --tensor-model-parallel-size 8 --sequence-parallel
        --pipeline-model-parallel-size 4 --decoder-last-pipeline-num-layers 13
        --expert-model-parallel-size 32 --expert-tensor-parallel-size 1
        --use-distributed-optimizer
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
        --use-dynamic-batch-size --max-tokens-per-gpu 16384
    )
    ROLLOUT=(
        --prompt-data "${DATA:-/shared/dapo-math-17k.jsonl}" --input-key prompt --label-key label
        --apply-chat-template --rollout-shuffle --rm-type math
        --num-rollout 3000 --rollout-batch-size 128 --n-samples-per-prompt 8 --global-batch-size 1024
        --rollout-max-response-len 32768 --rollout-temperature 1.0
        --rollout-num-gpus-per-engine 16 --sglang-mem-fraction-static 0.7
    )

    "${PYTHON:-python3}" train.py --train-backend megatron "${MODEL_ARGS[@]}" "${PARALLEL[@]}" "${ROLLOUT[@]}" \
        --hf-checkpoint "${MODEL:-/shared/DeepSeek-V3-bf16}" --save "$OUTPUT" --load "$OUTPUT" --save-interval 20 \
        --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --lr 1e-6 "$@"
)
