"""What one run does, from its configuration to its results."""
