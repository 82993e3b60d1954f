# Megatron's model arguments of Qwen3-235B-A22B, as config.json has them.
# The 2507 models have --rotary-base 5000000.
MODEL_ARGS=(
   --num-layers 94
   --hidden-size 4096
   --ffn-hidden-size 12288
   --swiglu
   --vocab-size 151936
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   # attention
   --num-attention-heads 64
   --group-query-attention
   --num-query-groups 4
   --kv-channels 128
   --qk-layernorm
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-6
   # rope
   --use-rotary-position-embeddings
   --rotary-base 1000000
   # experts
   --num-experts 128
   --moe-ffn-hidden-size 1536
   --moe-router-topk 8
   --moe-router-score-function softmax
   # experts in RL: no loss of their own
   --moe-token-dispatcher-type alltoall
   --moe-aux-loss-coeff 0
   --moe-router-dtype fp32
)
