# Megatron's model arguments of Qwen2.5-7B, as config.json has them.
MODEL_ARGS=(
   --num-layers 28
   --hidden-size 3584
   --ffn-hidden-size 18944
   --swiglu
   --vocab-size 152064
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   # attention
   --num-attention-heads 28
   --group-query-attention
   --num-query-groups 4
   --kv-channels 128
   --add-qkv-bias
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-6
   # rope
   --use-rotary-position-embeddings
   --rotary-base 1000000
)
