"""What may a user say, and where did each value come from?"""
