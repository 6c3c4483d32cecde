"""One layer by path following, in Grams against step by step: `python scripts/benchmark.py solver`."""

import argparse
import statistics
from functools import partial

import torch
from torch import Tensor

from compress.benchmarks import seconds, spread
from compress.quantization import Grid, Problem
from compress.quantization.moments import add_lower, mirror_lower
from compress.quantization.scales import max_abs_grid
from compress.quantization.solvers import GPFQ


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--columns", type=int, default=1152, help="d: weights of an output channel")
    parser.add_argument("--rows", type=int, default=128, help="N: output channels")
    parser.add_argument("--samples", type=int, default=8192, help="m: patches of the calibration images")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    analog = torch.randn(arguments.samples, arguments.columns, generator=draws).relu_()
    quantized = analog + 0.05 * torch.randn(analog.shape, generator=draws)
    weight = torch.randn(arguments.rows, arguments.columns, generator=draws)
    grid = max_abs_grid(weight, 2**arguments.bits)
    problem = weight, quantized, analog, grid
    same = (in_grams(*problem) == step_by_step(*problem)).double().mean().item()
    pairs = [[seconds(partial(solve, *problem)) for solve in (in_grams, step_by_step)] for _ in range(arguments.pairs)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"d {arguments.columns}, N {arguments.rows}, m {arguments.samples}, {arguments.bits} bit, one thread")
    print(f"Grams and their solve {ours:.2f} s, step by step {theirs:.2f} s, equal codes {100 * same:.2f} %")
    print(spread([slow / fast for fast, slow in pairs]))


def in_grams(weight: Tensor, quantized: Tensor, analog: Tensor, grid: Grid) -> Tensor:
    """Codes (N, d) of weight (N, d) from inputs (m, d); both Grams, as far as the solver reads them, are work too."""
    columns, others = quantized.T[None], analog.T[None]
    gram, cross = weight.new_zeros(2, 1, weight.shape[1], weight.shape[1])
    add_lower(gram, columns, columns)
    add_lower(cross, columns, others)
    return GPFQ()(Problem(weight, mirror_lower(gram)[0], cross[0], grid))


def step_by_step(weight: Tensor, quantized: Tensor, analog: Tensor, grid: Grid) -> Tensor:
    """The same by the definition: the error u (N, m) of all samples is carried from column to column."""
    error = weight.new_zeros(len(weight), len(quantized))
    codes = []
    for column in range(weight.shape[1]):
        seen, target = quantized[:, column], analog[:, column]
        error.addr_(weight[:, column], target)
        code = grid.quantize((error @ seen / seen.dot(seen))[:, None])
        error.addr_(grid.dequantize(code)[:, 0], seen, alpha=-1)
        codes.append(code)
    return torch.cat(codes, 1)
