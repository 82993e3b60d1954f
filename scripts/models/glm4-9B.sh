# Megatron's model arguments of GLM-4-9B-0414 and GLM-Z1-9B-0414, as config.json has them.
MODEL_ARGS=(
   --num-layers 40
   --hidden-size 4096
   --ffn-hidden-size 13696
   --swiglu
   --vocab-size 151552
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   # attention
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 2
   --kv-channels 128
   --add-qkv-bias
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-5
   --post-self-attn-layernorm
   --post-mlp-layernorm
   # rope
   --use-rotary-position-embeddings
   --rotary-base 10000
   --rotary-percent 0.5
   --rotary-interleaved
)
