"""How good is a checkpoint, on data or on text?"""
