"""How does a model become a Hugging Face folder, and a folder a model?"""
