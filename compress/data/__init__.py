"""Data sets in memory, the augmentation of batches, and the DataModule that joins them."""
