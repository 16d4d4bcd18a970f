"""Topology and engines: process launch, parallel degrees, the engine's joint, checkpoints.

The joint is that of Megatron-core and DeepSpeed.
"""
