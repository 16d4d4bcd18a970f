"""What may a model be trained for: samples, batches, losses. One entry and one file each."""
