"""How many operations and bytes does a model take?"""
