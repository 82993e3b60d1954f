# Megatron's model arguments of Qwen3-14B, as config.json has them.
MODEL_ARGS=(
   --num-layers 40
   --hidden-size 5120
   --ffn-hidden-size 17408
   --swiglu
   --vocab-size 151936
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   # attention
   --num-attention-heads 40
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --qk-layernorm
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-6
   # rope
   --use-rotary-position-embeddings
   --rotary-base 1000000
)
