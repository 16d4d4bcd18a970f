"""How does one follow all runs at once?"""
