"""Rounding to the nearest grid point (RTN), the baseline of all other solvers."""

from dataclasses import dataclass

from torch import Tensor

from compress.quantization.problem import Problem, Solver


@dataclass(frozen=True)
class RTN(Solver):
    """Every weight to the nearest point of its row's grid, a pruned one to zero; the Grams are not read."""

    reads_inputs = False

    def __call__(self, problem: Problem) -> Tensor:
        weight = problem.weight if problem.mask is None else problem.weight * problem.mask
        return problem.grid.quantize(problem.repeat_for_candidates(weight))
