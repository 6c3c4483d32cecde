"""Data sets in memory or on disk, the augmentation of batches, and the DataModule that joins them."""
