"""How does a checkpoint become a Hugging Face folder and back, and is it the same model?"""
