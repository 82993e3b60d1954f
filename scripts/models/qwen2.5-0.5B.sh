# Megatron's model arguments of Qwen2.5-0.5B, as config.json has them.
MODEL_ARGS=(
   --num-layers 24
   --hidden-size 896
   --ffn-hidden-size 4864
   --swiglu
   --vocab-size 151936
   --disable-bias-linear
   # attention
   --num-attention-heads 14
   --group-query-attention
   --num-query-groups 2
   --kv-channels 64
   --add-qkv-bias
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-6
   # rope
   --use-rotary-position-embeddings
   --rotary-base 1000000
)
