"""How do pairs of texts become rows of a source and a target side?"""
