"""What may be said in one section of a configuration, and what follows from it?"""
