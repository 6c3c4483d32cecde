"""Data sets in memory, the augmentation of whole batches, and the DataModule that joins them."""
