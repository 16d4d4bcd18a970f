"""Which families of models are there, and what is each made of? One entry and one file each."""
