"""The TrainBackend on PyTorch FSDP2 and transformers."""
