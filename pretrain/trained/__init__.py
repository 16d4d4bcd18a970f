"""What does one do with a checkpoint?"""
