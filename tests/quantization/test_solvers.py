"""GPFQ in Gram form against the published step, written out over the samples in float64."""

import pytest
import torch

from compress.quantization import Grid, Problem
from compress.quantization.scales import mse_grid
from compress.quantization.solvers import GPFQ, RTN


def published_loop(weight, quantized, analog, grid):
    """q_t = Q(<x~_t, u + w_t x_t> / |x~_t|^2), u += w_t x_t - q_t x~_t, row by row and step by step."""
    rows, depth = weight.shape
    codes = torch.empty(rows, depth, dtype=torch.int64)
    for row in range(rows):
        scale, zero = grid.scale[row].item(), grid.zero_point[row].item()
        u = torch.zeros(analog.shape[0], dtype=torch.float64)
        for t in range(depth):
            u = u + weight[row, t] * analog[:, t]
            energy = (quantized[:, t] @ quantized[:, t]).item()
            value = (quantized[:, t] @ u).item() / energy if energy > 0 else 0.0
            code = min(max(round(value / scale) + zero, 0), grid.levels - 1)
            codes[row, t] = code
            u = u - scale * (code - zero) * quantized[:, t]
    return codes


def problem(seed, rows=5, depth=90, samples=200, dead=()):
    generator = torch.Generator().manual_seed(seed)
    analog = torch.randn(samples, depth, dtype=torch.float64, generator=generator).relu()
    quantized = analog + 0.2 * torch.randn(samples, depth, dtype=torch.float64, generator=generator)
    quantized[:, list(dead)] = 0
    weight = torch.randn(rows, depth, dtype=torch.float64, generator=generator)
    return weight, quantized, analog


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("block_size", [1, 64, 90])
@pytest.mark.parametrize("dead", [(), (0, 17, 63, 64, 89)])
def test_gpfq_codes_equal_the_published_loop(bits, block_size, dead):
    weight, quantized, analog = problem(bits, dead=dead)
    grid = mse_grid(weight, 2**bits, quantized.square().sum(0))
    codes = GPFQ(block_size=block_size)(Problem(weight, quantized.T @ quantized, quantized.T @ analog, grid))
    assert codes.shape == weight.shape
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), published_loop(weight, quantized, analog, grid))


def test_gpfq_codes_equal_the_loop_at_16_bits_where_bytes_are_too_small():
    weight, quantized, analog = problem(3, rows=3, depth=40)
    grid = mse_grid(weight, 2**16)
    codes = GPFQ(block_size=7)(Problem(weight, quantized.T @ quantized, quantized.T @ analog, grid))
    assert codes.dtype == torch.int32
    assert torch.equal(codes.long(), published_loop(weight, quantized, analog, grid))


def test_a_column_without_inputs_takes_zero():
    weight, quantized, analog = problem(4, dead=(5,))
    grid = Grid(torch.full((5,), 0.5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 2]), 4)
    codes = GPFQ()(Problem(weight, quantized.T @ quantized, quantized.T @ analog, grid))
    assert codes[:, 5].tolist() == grid.zero_point.tolist()
    nothing = torch.zeros(90, 90, dtype=torch.float64)
    assert (GPFQ()(Problem(weight, nothing, nothing, grid)) == grid.zero_point[:, None]).all()


def test_gpfq_leaves_its_arguments_alone():
    weight, quantized, analog = problem(5)
    gram, cross = quantized.T @ quantized, quantized.T @ analog
    grid = mse_grid(weight, 4)
    arguments = [weight, gram, cross, grid.scale, grid.zero_point]
    before = [each.clone() for each in arguments]
    GPFQ(block_size=16)(Problem(weight, gram, cross, grid))
    assert all(torch.equal(now, then) for now, then in zip(arguments, before, strict=True))


def test_gpfq_gives_less_output_error_than_nearest_rounding():
    weight, quantized, analog = problem(6, rows=20, samples=400)
    gram, cross = quantized.T @ quantized, quantized.T @ analog
    grid = mse_grid(weight, 4, gram.diagonal())
    target = analog @ weight.T

    def output_error(codes):
        return (target - quantized @ grid.dequantize(codes).T).square().sum(0)

    task = Problem(weight, gram, cross, grid)
    greedy, nearest = GPFQ()(task), RTN()(task)
    assert torch.equal(nearest, grid.quantize(weight))
    assert output_error(greedy).sum() < 0.8 * output_error(nearest).sum()
    for codes in (greedy, nearest):
        exact = task.error(codes) + target.square().sum(0)
        torch.testing.assert_close(exact, output_error(codes), rtol=1e-9, atol=1e-9)
