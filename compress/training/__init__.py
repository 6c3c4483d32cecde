"""One fit: checkpoints, early stopping, processes that train together."""
