"""Commands for research on depth: probe, duel, use of layers."""
