"""What a run leaves: rows, records, pictures and tables. This package knows rows, not models."""
