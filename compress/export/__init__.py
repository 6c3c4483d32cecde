"""Files of models: packed quantized weights, and plain float32 ones."""

from compress.export.packed import read_model, read_packed, write_float, write_packed

__all__ = ["read_model", "read_packed", "write_float", "write_packed"]
