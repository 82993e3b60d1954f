# Megatron's model arguments of Llama-3.2-3B, as config.json has them.
MODEL_ARGS=(
   --num-layers 28
   --hidden-size 3072
   --ffn-hidden-size 8192
   --swiglu
   --vocab-size 128256
   --disable-bias-linear
   # attention
   --num-attention-heads 24
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-5
   # rope
   --use-rotary-position-embeddings
   --rotary-base 500000
   --use-rope-scaling
   --rope-scaling-factor 32
)
