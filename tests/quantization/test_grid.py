"""Grids: what a code means, what is refused, and that each rule finds the scale its definition names."""

import re

import pytest
import torch

from compress.quantization.grid import Grid
from compress.quantization.scales import GridOptions, max_abs_grid, mse_grid, percentile_grid


def brute_force_points(scale, zero_point, levels):
    return [scale * (code - zero_point) for code in range(levels)]


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 256, 257])
def test_quantize_takes_the_nearest_point_and_dequantize_its_value(levels):
    torch.manual_seed(0)
    zero_point = torch.tensor([0, levels // 2, levels - 1])
    grid = Grid(torch.tensor([0.5, 0.013, 2.0], dtype=torch.float64), zero_point, levels)
    values = torch.randn(3, 40, dtype=torch.float64) * torch.tensor([[levels / 2], [0.01 * levels], [levels]])
    codes = grid.quantize(values)
    assert codes.dtype == (torch.uint8 if levels <= 256 else torch.int32)
    for row in range(3):
        points = torch.tensor(brute_force_points(grid.scale[row].item(), zero_point[row].item(), levels)).double()
        nearest = (values[row][:, None] - points).abs().argmin(1)
        assert torch.equal(codes[row].long(), nearest)
        torch.testing.assert_close(grid.dequantize(codes)[row], points[nearest], rtol=1e-6, atol=0)


def test_zero_is_on_every_grid_and_shapes_of_convolutions_are_kept():
    grid = Grid(torch.tensor([0.1, 0.7]), torch.tensor([1, 2]), 4)
    codes = grid.quantize(torch.zeros(2, 3, 3, 3))
    assert codes.shape == (2, 3, 3, 3)
    assert codes[0].unique().tolist() == [1]
    assert torch.equal(grid.dequantize(codes), torch.zeros(2, 3, 3, 3))


@pytest.mark.parametrize(("levels", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (65536, 16)])
def test_bits_is_the_width_that_holds_every_code(levels, bits):
    assert Grid(torch.ones(1), torch.zeros(1, dtype=torch.int32), levels).bits == bits


@pytest.mark.parametrize(
    ("scale", "zero_point", "levels", "named"),
    [
        ([1.0], [0], 1, "levels: 1"),
        ([1.0], [0], True, "levels: True"),
        ([1.0, 0.0], [0, 0], 4, "scale: 0.0"),
        ([float("nan")], [0], 4, "scale: nan"),
        ([1.0], [4], 4, "zero_point: 4"),
        ([1.0], [-1], 4, "zero_point: -1"),
        ([1.0], [1.0], 4, "zero_point: torch.float32"),
        ([1.0, 2.0], [1], 4, "zero_point: torch.int64 (1,)"),
    ],
)
def test_a_grid_that_cannot_be_names_the_value(scale, zero_point, levels, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        Grid(torch.tensor(scale), torch.tensor(zero_point), levels)


def test_rows_and_repeat_select_channels():
    grid = Grid(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 2]), 4)
    assert grid.rows(slice(1, 3)).scale.tolist() == [2.0, 3.0]
    assert grid.repeat(2).zero_point.tolist() == [0, 1, 2, 0, 1, 2]


def error_of(weight, importance, scale, zero_point, levels):
    points = torch.tensor(brute_force_points(scale, zero_point, levels), dtype=torch.float64)
    nearest = (weight[:, None] - points).abs().amin(1)
    return float((importance * nearest.square()).sum())


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16])
def test_mse_grid_is_as_good_as_a_search_over_a_thousand_scales_and_both_sides(levels):
    torch.manual_seed(levels)
    weight = torch.randn(6, 50, dtype=torch.float64) + torch.tensor([[0.0], [1.0], [-1.0], [0.3], [0.0], [2.0]])
    importance = torch.rand(50, dtype=torch.float64) + 0.01
    grid = mse_grid(weight, levels, importance)
    for row in range(6):
        largest = weight[row].abs().max().item()
        zero_points = {levels // 2, (levels - 1) // 2}
        searched = min(
            error_of(weight[row], importance, largest * step / 1000, zero_point, levels)
            for step in range(1, 1101)
            for zero_point in zero_points
        )
        found = error_of(weight[row], importance, grid.scale[row].item(), grid.zero_point[row].item(), levels)
        assert found <= 1.03 * searched


def test_mse_grid_leans_to_the_side_where_the_weights_are():
    weight = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [2.0, 1.0, 0.0, -1.0]])
    grid = mse_grid(weight, 4)
    assert grid.zero_point.tolist() == [2, 1]
    torch.testing.assert_close(grid.dequantize(grid.quantize(weight)), weight, rtol=0.05, atol=0.05)


def test_mse_grid_forgets_columns_without_inputs():
    weight = torch.tensor([[0.1, -0.2, 0.1, 50.0]])
    grid = mse_grid(weight, 4, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert grid.scale.item() < 0.25
    per_row = mse_grid(weight.repeat(2, 1), 4, torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    torch.testing.assert_close(per_row.scale[0], grid.scale[0], rtol=0.2, atol=0)
    assert per_row.scale[1] > 20


@pytest.mark.parametrize("rule", [mse_grid, max_abs_grid, GridOptions(scale="percentile").choose])
@pytest.mark.parametrize("importance", [None, torch.zeros(5), torch.ones(5)])
def test_a_channel_of_zeros_gets_a_valid_scale_and_stays_zero(rule, importance):
    weight = torch.zeros(3, 5)
    grid = rule(weight, 4, importance)
    assert grid.scale.tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(grid.dequantize(grid.quantize(weight)), weight)


def test_max_abs_grid_spans_the_largest_weight_on_both_sides():
    weight = torch.tensor([[0.5, -1.5], [3.0, 0.0]])
    assert max_abs_grid(weight, 4).scale.tolist() == [1.0, 2.0]
    assert max_abs_grid(weight, 5).scale.tolist() == [0.75, 1.5]
    assert max_abs_grid(weight, 5).zero_point.tolist() == [2, 2]


def test_percentile_grid_is_one_scale_from_the_mean_of_the_channels_quantiles():
    torch.manual_seed(1)
    weight = torch.randn(7, 101)
    radius = sum(sorted(row.abs().tolist())[90] for row in weight) / 7  # 0.9 of 100 steps
    grid = percentile_grid(weight, 5, percentile=0.9, scalar=1.5)
    torch.testing.assert_close(grid.scale, torch.full((7,), 1.5 * radius / 2))
    assert grid.zero_point.tolist() == [2] * 7
