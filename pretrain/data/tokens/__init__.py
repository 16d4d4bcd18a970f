"""How does text become token ids?"""
