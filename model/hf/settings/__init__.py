"""How does `config.json` say what a model is, both ways?"""
