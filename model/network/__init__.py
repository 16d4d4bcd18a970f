"""How do layers, embeddings and a head become a model with a loss?"""
