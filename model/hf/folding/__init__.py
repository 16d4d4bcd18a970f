"""Which stock architecture computes a model exactly, and with which factors?"""
