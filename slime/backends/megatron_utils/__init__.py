"""The TrainBackend on Megatron-core, and the names of its models. Importing it does not import Megatron."""
