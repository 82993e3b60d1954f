# Megatron's model arguments of Meta-Llama-3-70B, as config.json has them.
MODEL_ARGS=(
   --num-layers 80
   --hidden-size 8192
   --ffn-hidden-size 28672
   --swiglu
   --vocab-size 128256
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   # attention
   --num-attention-heads 64
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-5
   # rope
   --use-rotary-position-embeddings
   --rotary-base 500000
)
