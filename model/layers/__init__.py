"""How is one layer computed, by PyTorch's parts and by Transformer Engine's?"""
