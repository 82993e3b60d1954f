# Megatron's model arguments of GLM-4.5-Air, as config.json has them.
MODEL_ARGS=(
   --num-layers 46
   --hidden-size 4096
   --ffn-hidden-size 10944
   --swiglu
   --vocab-size 151552
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   # attention
   --num-attention-heads 96
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --add-qkv-bias
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-5
   # rope
   --use-rotary-position-embeddings
   --rotary-base 1000000
   --rotary-percent 0.5
   # experts
   --num-experts 128
   --moe-ffn-hidden-size 1408
   --moe-router-topk 8
   --moe-layer-freq "([0]*1+[1]*45)"
   --moe-shared-expert-intermediate-size 1408
   --moe-router-score-function sigmoid
   --moe-router-enable-expert-bias
   # experts in RL: no loss of their own
   --moe-token-dispatcher-type alltoall
   --moe-aux-loss-coeff 0
   --moe-router-dtype fp32
)
