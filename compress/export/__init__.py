"""Files of models: one module per format, `weights` for any file with weights."""

from compress.export.packed import read_model, read_packed, write_float, write_packed

__all__ = ["read_model", "read_packed", "write_float", "write_packed"]
