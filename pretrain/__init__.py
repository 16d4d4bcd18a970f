"""Pretraining: configuration, data, the loop and its callbacks."""
