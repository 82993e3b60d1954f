#!/usr/bin/env bash
# GRPO on Qwen3-4B against a reference model: the GPUs of one node, FSDP2 and SGLang colocated. Can be run or sourced.
#
#   MODEL=~/Qwen3-4B DATA=~/dapo-math-17k/dapo-math-17k.jsonl EVAL_DATA=~/aime-2024/aime-2024.jsonl \
#       OUTPUT=runs/qwen3-4B-fsdp NUM_GPUS=8 scripts/run-qwen3-4B-fsdp.sh [more flags of slime, which win]
#
# With WANDB_API_KEY set the run is logged there too. A run that was interrupted goes on with --resume.
(
    set -euo pipefail
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    OUTPUT=${OUTPUT:-runs/qwen3-4B-fsdp}
    WANDB_ARGS=()
    if [[ -n "${WANDB_API_KEY:-}" ]]; then WANDB_ARGS=(--use-wandb --wandb-project slime --wandb-group qwen3-4B-fsdp); fi

    CKPT_ARGS=(--hf-checkpoint "${MODEL:-$HOME/Qwen3-4B}" --save "$OUTPUT" --save-interval 20)
    ROLLOUT_ARGS=(
        --prompt-data "${DATA:-$HOME/dapo-math-17k/dapo-math-17k.jsonl}"
        --input-key prompt --label-key label --apply-chat-template --rollout-shuffle --rm-type deepscaler
        --num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
        --rollout-max-response-len 8192 --rollout-temperature 1.0
    )
    EVAL_ARGS=(
        --eval-interval 20 --eval-prompt-data aime "${EVAL_DATA:-$HOME/aime-2024/aime-2024.jsonl}"
        --n-samples-per-eval-prompt 16 --eval-max-response-len 16384
    )
    GRPO_ARGS=(
        --advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.001 --kl-loss-type low_var_kl
        --eps-clip 0.2 --eps-clip-high 0.28
    )
    TRAIN_ARGS=(
        --train-backend fsdp --lr 1e-6 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
        --use-dynamic-batch-size --max-tokens-per-gpu 16384 --gradient-checkpointing
    )
    CLUSTER_ARGS=(--colocate --actor-num-nodes 1 --actor-num-gpus-per-node "${NUM_GPUS:-8}")
    SGLANG_ARGS=(--sglang-mem-fraction-static 0.6)

    "${PYTHON:-python3}" train.py "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" \
        "${TRAIN_ARGS[@]}" "${CLUSTER_ARGS[@]}" "${SGLANG_ARGS[@]}" "${WANDB_ARGS[@]}" "$@"
)
