"""How are samples for masked language modelling cut and masked?"""
