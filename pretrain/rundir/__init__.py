"""Which files does a run leave, and who may write them?"""
