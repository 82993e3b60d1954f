# Megatron's model arguments of Qwen2.5-72B, as config.json has them.
# The base model (not Instruct) has --norm-epsilon 1e-5.
MODEL_ARGS=(
   --num-layers 80
   --hidden-size 8192
   --ffn-hidden-size 29568
   --swiglu
   --vocab-size 152064
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   # attention
   --num-attention-heads 64
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --add-qkv-bias
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-6
   # rope
   --use-rotary-position-embeddings
   --rotary-base 1000000
)
