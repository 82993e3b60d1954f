# Megatron's model arguments of Qwen2.5-1.5B, as config.json has them.
MODEL_ARGS=(
   --num-layers 28
   --hidden-size 1536
   --ffn-hidden-size 8960
   --swiglu
   --vocab-size 151936
   --disable-bias-linear
   # attention
   --num-attention-heads 12
   --group-query-attention
   --num-query-groups 2
   --kv-channels 128
   --add-qkv-bias
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-6
   # rope
   --use-rotary-position-embeddings
   --rotary-base 1000000
)
