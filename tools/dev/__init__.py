"""Commands for those who work on Fathom itself."""
