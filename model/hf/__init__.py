"""Conversion between canonical weights and Hugging Face models, and a plain evaluation of canonical weights."""
