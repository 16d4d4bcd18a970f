"""How does the signal through the layers fare while a model trains?"""
