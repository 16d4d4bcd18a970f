"""How are spans of a text hidden, for an encoder and a decoder?"""
