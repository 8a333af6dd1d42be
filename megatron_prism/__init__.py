"""megatron-prism: mid-training, merging, long-context extension and RL of open base models on megatron-core."""

__version__ = "0.1.0"
