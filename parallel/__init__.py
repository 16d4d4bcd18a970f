"""Topology and engines: process launch, parallel degrees, the Megatron-DeepSpeed joint, checkpoints."""
