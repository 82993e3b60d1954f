"""The embedded engine: continuous batching over Hugging Face models behind SGLang's HTTP protocol, in one process."""
