"""Topology and engines: starting processes, degrees, Megatron-core with DeepSpeed, checkpoints."""
