"""Post-training quantization of weights: `quantize` one network once, `Quantizer` does what YAML says."""

from compress.quantization.activations import Activations
from compress.quantization.grid import Grid
from compress.quantization.moments import GramOptions
from compress.quantization.options import Correction, Options
from compress.quantization.post_training import quantize
from compress.quantization.problem import Problem, Solver
from compress.quantization.quantized import QuantizedLayer, QuantizedModel
from compress.quantization.quantizer import Quantizer
from compress.quantization.rate_search import Measures
from compress.quantization.refinement import Refinement
from compress.quantization.scales import GridOptions
from compress.quantization.tuning import Tuning

__all__ = [
    "Activations",
    "Correction",
    "GramOptions",
    "Grid",
    "GridOptions",
    "Measures",
    "Options",
    "Problem",
    "QuantizedLayer",
    "QuantizedModel",
    "Quantizer",
    "Refinement",
    "Solver",
    "Tuning",
    "quantize",
]
