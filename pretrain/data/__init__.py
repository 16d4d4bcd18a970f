"""How does text become sample number i?"""
