"""Which parameters does a model have, what are they called, and how are they cut?"""
