"""Tokenizers of exports: made from a SentencePiece model, or copied."""
