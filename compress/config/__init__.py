"""Composing a configuration and checking its values."""
