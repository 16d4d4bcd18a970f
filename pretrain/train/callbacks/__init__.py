"""What is optional about a run?"""
