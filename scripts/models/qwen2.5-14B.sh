# Megatron's model arguments of Qwen2.5-14B, as config.json has them.
# The base model (not Instruct) has --norm-epsilon 1e-5.
MODEL_ARGS=(
   --num-layers 48
   --hidden-size 5120
   --ffn-hidden-size 13824
   --swiglu
   --vocab-size 152064
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   # attention
   --num-attention-heads 40
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
