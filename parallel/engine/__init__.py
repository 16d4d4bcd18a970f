"""How do Megatron-core's passes and DeepSpeed's optimizer make one step?"""
