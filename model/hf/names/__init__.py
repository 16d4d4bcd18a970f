"""What are canonical tensors called in Hugging Face's classes, and how are they cut and turned?"""
