"""How do image files become sample number i?"""
