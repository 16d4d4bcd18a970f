"""What are the depth schemes, and what does one say for layer l of N?"""
