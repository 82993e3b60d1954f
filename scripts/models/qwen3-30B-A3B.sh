# Megatron's model arguments of Qwen3-30B-A3B, as config.json has them.
# The 2507 models have --rotary-base 10000000.
MODEL_ARGS=(
   --num-layers 48
   --hidden-size 2048
   --ffn-hidden-size 6144
   --swiglu
   --vocab-size 151936
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   # attention
   --num-attention-heads 32
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
   --moe-ffn-hidden-size 768
   --moe-router-topk 8
   --moe-router-score-function softmax
   # experts in RL: no loss of their own
   --moe-token-dispatcher-type alltoall
   --moe-aux-loss-coeff 0
   --moe-router-dtype fp32
)
