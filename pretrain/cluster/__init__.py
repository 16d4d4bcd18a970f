"""How do runs get onto a cluster's machines, and stay there?"""
