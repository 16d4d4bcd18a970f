"""What can this machine compute, and in which precision?"""
