"""Can a run begin, on these nodes and in their memory?"""
