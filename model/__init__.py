"""Model maths: depth schemes, signal theory, the transformer layer and GPT.

Knows no process group and no engine.
"""

__version__ = "0.1.0"
"""Of all of Fathom. `fathom --version`, the package and what runs note down read it here."""
