"""Pruned weights, kinds of grids, quantized inputs and capped rows."""

import pytest
import torch
from torch import nn

from compress.quantization import Activations, GramOptions, GridOptions, Problem, Refinement, quantize
from compress.quantization.activations import input_quantizers
from compress.quantization.patches import spread
from compress.quantization.refinement import refine_codes
from compress.quantization.scales import mse_grid
from compress.quantization.solvers import GPFQ, GPTQ, RTN, SPFQ, Qronos


def problem(rows=6, depth=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, depth, generator=generator, dtype=torch.float64)
    quantized = inputs + 0.1 * torch.randn(200, depth, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, depth, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, depth, generator=generator) > 0.5
    return weight * mask, mask, quantized.T @ quantized, quantized.T @ inputs


@pytest.mark.parametrize("solver", [GPFQ(block_size=16), SPFQ(block_size=16), GPTQ(block_size=16), Qronos(), RTN()])
def test_a_pruned_weight_stays_zero_through_every_solver_and_descent(solver):
    weight, mask, gram, cross = problem()
    grid = mse_grid(weight, 4, gram.diagonal())
    task = Problem(weight, gram, cross, grid, mask)
    codes = solver(task)
    better, _ = refine_codes(task, codes)
    for each in (codes, better):
        assert bool((grid.dequantize(each)[~mask] == 0).all())
        assert bool((grid.dequantize(each)[mask] != 0).any())
    before, after = (task.error(each) for each in (codes, better))
    assert bool((after <= before + 1e-9).all())


def test_masked_gpfq_is_the_loop_over_samples_that_skips_pruned_weights():
    weight, mask, _, _ = problem()
    generator = torch.Generator().manual_seed(1)
    analog = torch.randn(100, 40, generator=generator, dtype=torch.float64)
    noisy = analog + 0.1 * torch.randn(100, 40, generator=generator, dtype=torch.float64)
    grid = mse_grid(weight, 4)
    codes = GPFQ(block_size=7)(Problem(weight, noisy.T @ noisy, noisy.T @ analog, grid, mask))
    for row in range(len(weight)):
        error = torch.zeros(100, dtype=torch.float64)
        for column in range(40):
            error += weight[row, column] * analog[:, column]
            if mask[row, column]:
                wanted = (noisy[:, column] @ error) / noisy[:, column].square().sum()
                zero = grid.zero_point[row]
                code = ((wanted / grid.scale[row]).round() + zero).clamp(0, 3)
                assert int(code) == int(codes[row, column])
                error -= (code - zero) * grid.scale[row] * noisy[:, column]


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 5)).eval()


def test_a_pruned_network_keeps_exactly_its_zeros():
    model, images = network(), [torch.randn(32, 3, 8, 8)]
    with torch.no_grad():
        model[3].weight[torch.rand_like(model[3].weight) < 0.5] = 0
    pruned = model[3].weight == 0
    quantized = quantize(model, images, 2, refinement=Refinement(4, 2, True)).model
    assert bool((quantized.get_submodule("3").weight[pruned] == 0).all())


def test_a_layer_has_one_scale_where_that_is_asked_for():
    options = {"grid": GridOptions(granularity="layer"), "refinement": Refinement(4, 2, True)}
    layers = quantize(network(), [torch.randn(32, 3, 8, 8)], 3, **options).layers
    assert all(len(layer.grid.scale.unique()) == 1 for layer in layers.values())


@pytest.mark.parametrize("levels", [4, 16])
def test_affine_grids_lose_least_on_one_sided_weights(levels):
    weight = torch.rand(5, 300, dtype=torch.float64)

    def error(kind):
        grid = mse_grid(weight, levels, zero_point=kind)
        return (grid.dequantize(grid.quantize(weight)) - weight).square().sum().item()

    assert error("affine") < 0.5 * error("symmetric")
    assert error("mirrored") <= error("symmetric")


def test_narrow_grids_have_as_many_levels_on_either_side():
    layers = quantize(network(), [torch.randn(8, 3, 8, 8)], 3, grid=GridOptions(alphabet="narrow")).layers
    assert [layer.grid.levels for layer in layers.values()] == [255, 7, 255]
    assert all(bool((layer.grid.zero_point == layer.grid.levels // 2).all()) for layer in layers.values())


@pytest.mark.parametrize("rule", ["mse", "min_max", "percentile"])
def test_inputs_are_calibrated_within_half_a_step(rule):
    values = torch.rand(64, 100) * 3
    grid = Activations(rule).calibrate([values], 8)
    assert int(grid.zero_point) == 0
    inside = values <= 255 * grid.scale
    assert float(inside.float().mean()) > 0.99
    assert float((grid(values) - values)[inside].abs().max()) <= 0.501 * float(grid.scale)
    assert int(Activations(rule).calibrate([values - 1.5], 8).zero_point) in range(120, 136)


@pytest.mark.parametrize("shape", [(64, 64, 32, 32), (256, 256, 8, 8), (256, 512, 4, 4)])
def test_a_range_is_chosen_by_all_places_of_an_image(shape):
    # Nothing at the left border, as in most pictures of things.
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    values[..., 0] *= 0.01
    grid = Activations().calibrate([values], 4)
    error = (grid(values) - values).square().mean() / values.square().mean()
    # 15 steps between 0 and 1, of which the error is uniform: 1 / 15^2 / 12 against a mean square of 1/3.
    assert float(error) < 1.1 * 3 / 12 / 15**2


def test_quantized_inputs_are_part_of_the_network_and_of_what_its_weights_are_solved_for():
    model, images = network(), torch.randn(64, 3, 8, 8)
    quantized = quantize(model, [images], 8, activation_bits=8)
    assert {grid.bits for grid in input_quantizers(quantized.model).values()} == {8}
    assert len(input_quantizers(quantized.model)) == len(quantized.layers)
    error = (quantized.model(images) - model(images)).norm() / model(images).norm()
    assert 0 < error < 0.03
    coarse = quantize(model, [images], 8, activation_bits=3, first_last_bits=None)
    assert (coarse.model(images) - model(images)).norm() / model(images).norm() > 3 * error


@pytest.mark.parametrize(("step", "period"), [(1, 64), (32, 1024), (7, 784), (4, 6)])
def test_every_so_many_rows_meet_every_place_of_an_image(step, period):
    chosen = spread(step, period)
    assert step <= chosen <= step + 5
    assert {row % period for row in range(0, chosen * period, chosen)} == set(range(period))


def test_capped_rows_do_not_depend_on_how_the_images_are_cut():
    model, images = network(), torch.randn(40, 3, 8, 8)
    options = {"grams": GramOptions(500, "float64")}
    whole = quantize(model, [images], 3, **options).layers
    parts = quantize(model, list(images.split(7)), 3, **options).layers
    every = quantize(model, [images], 3, grams=GramOptions(dtype="float64")).layers
    assert all(torch.equal(whole[name].codes, parts[name].codes) for name in whole)
    assert any(not torch.equal(whole[name].codes, every[name].codes) for name in whole)
