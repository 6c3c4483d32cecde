"""Post-training quantization of weights: `quantize` one network once, `Quantizer` does what YAML says."""

from compress.models.folding import fold_batch_norm
from compress.quantization.grid import Grid
from compress.quantization.post_training import QuantizedLayer, QuantizedModel, check_layers, quantize
from compress.quantization.quantizer import Measures, Quantizer

__all__ = [
    "Grid",
    "Measures",
    "QuantizedLayer",
    "QuantizedModel",
    "Quantizer",
    "check_layers",
    "fold_batch_norm",
    "quantize",
]
