"""Does a trained model use its layers?"""
