"""TrainBackend on Megatron-core: tensor, pipeline, context and expert parallel. Importing it imports no Megatron."""
