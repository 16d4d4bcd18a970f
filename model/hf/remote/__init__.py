"""What travels with an export of our own class: transformers reads it, nothing else does."""
