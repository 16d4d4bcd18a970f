"""How does one checkpoint fit every layout?

A checkpoint is a folder with `manifest.json` and two files per writing process:
`rank_00000.safetensors` has flat pieces,
`rank_00000.json` says what part of which whole tensor each piece is.

Every parameter has one global name and three fp32 tensors, whatever layout wrote them.
Every process writes the bytes it owns, and nothing travels.
Readers put whole tensors or any slice together.
"""
