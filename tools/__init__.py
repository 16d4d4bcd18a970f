"""The `fathom` command line: thin commands over importable functions."""
