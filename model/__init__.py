"""Model maths: depth schemes, signal theory, the transformer layer and GPT.

Knows no process group and no engine.
"""
