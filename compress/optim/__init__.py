"""Learning-rate schedules, and optimizers that PyTorch lacks."""
