"""How does one checkpoint fit every layout?

A checkpoint is a folder: `manifest.json`, and per writing process `rank_00000.safetensors` with flat
pieces and `rank_00000.json`, which says what part of which whole tensor each piece is. Every parameter
has one global name and three fp32 tensors, whatever layout wrote them. Every process writes the bytes it
owns and nothing travels; readers put whole tensors or any slice together.
"""
