"""How do processes start, find each other, and end?"""
