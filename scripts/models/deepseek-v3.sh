# Megatron's model arguments of DeepSeek-V3 and R1, as config.json has them.
MODEL_ARGS=(
   --num-layers 61
   --hidden-size 7168
   --ffn-hidden-size 18432
   --swiglu
   --vocab-size 129280
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   # attention
   --num-attention-heads 128
   --multi-latent-attention
   --qk-layernorm
   --q-lora-rank 1536
   --kv-lora-rank 512
   --qk-head-dim 128
   --qk-pos-emb-head-dim 64
   --v-head-dim 128
   # norm
   --normalization "RMSNorm"
   --norm-epsilon 1e-6
   # rope
   --use-rotary-position-embeddings
   --rotary-base 10000
   --rope-type yarn
   --rotary-scaling-factor 40
   --mscale 1
   --mscale-all-dim 1
   # experts
   --num-experts 256
   --moe-ffn-hidden-size 2048
   --moe-router-topk 8
   --moe-layer-freq "([0]*3+[1]*58)"
   --moe-shared-expert-intermediate-size 2048
   --moe-router-score-function sigmoid
   --moe-router-enable-expert-bias
   --moe-router-num-groups 8
   --moe-router-group-topk 4
   --moe-router-topk-scaling-factor 2.5
   # experts in RL: no loss of their own
   --moe-token-dispatcher-type alltoall
   --moe-aux-loss-coeff 0
   --moe-router-dtype fp32
)
