"""Files of models: one module per format, `weights` for any file with weights."""
