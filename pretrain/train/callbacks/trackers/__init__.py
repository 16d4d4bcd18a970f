"""How does a run reach the pages on which teams follow runs? A process for each."""
