"""Solvers: each chooses the codes of a `compress.quantization.problem.Problem`."""

from compress.quantization.solvers.error_diffusion import GPTQ, Qronos
from compress.quantization.solvers.path_following import GPFQ, SPFQ
from compress.quantization.solvers.rounding import RTN

__all__ = ["GPFQ", "GPTQ", "RTN", "SPFQ", "Qronos"]
