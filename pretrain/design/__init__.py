"""How does one get from a size, a depth and a budget to a configuration?"""
