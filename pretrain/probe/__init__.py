"""What does the signal do at initialisation?"""
