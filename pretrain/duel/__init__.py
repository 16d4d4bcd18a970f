"""Which depth scheme is better, fairly compared?"""
