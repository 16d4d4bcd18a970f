"""How are weights drawn, and what do they make of a signal?"""
