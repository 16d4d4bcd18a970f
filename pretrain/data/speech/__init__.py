"""How do recordings become filterbanks beside their words?"""
