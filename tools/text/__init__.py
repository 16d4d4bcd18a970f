"""Commands over text: tokenizers and prepared data."""
