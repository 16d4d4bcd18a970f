"""Canonical, topology-free checkpoints: every parameter has one global name and three fp32 tensors, whatever layout wrote or reads them.

A checkpoint is a folder: `manifest.json`, and per writing process `rank_00000.safetensors` with flat pieces and `rank_00000.json` saying which part of
which whole tensor each piece is. Every process writes the bytes it owns and nothing travels; readers put whole tensors or any slice together.
"""
