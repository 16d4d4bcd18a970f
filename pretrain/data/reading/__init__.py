"""Where do documents come from, and how do they come out of their files?"""
