"""SPFQ, thresholds, GPTQ, Qronos and the refinements against their definitions, over the samples in float64."""

import pytest
import torch
from torch import nn

from compress.quantization import Grid, GridOptions, Problem, quantize
from compress.quantization.refinement import Refinement, refine_codes, refit_scales, search_scales
from compress.quantization.scales import mse_grid
from compress.quantization.solvers import GPFQ, GPTQ, RTN, SPFQ, Qronos


def problem(seed, rows=6, depth=30, samples=300, dead=()):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(depth, depth, dtype=torch.float64, generator=generator) / depth**0.5
    analog = (torch.randn(samples, depth, dtype=torch.float64, generator=generator) @ mixing).relu() + 0.1
    quantized = analog + 0.1 * torch.randn(samples, depth, dtype=torch.float64, generator=generator)
    quantized[:, list(dead)] = 0
    weight = torch.randn(rows, depth, dtype=torch.float64, generator=generator)
    return weight, quantized, analog, quantized.T @ quantized, quantized.T @ analog


def nearest(value, grid, row):
    code = round(value / grid.scale[row].item()) + grid.zero_point[row].item()
    return min(max(code, 0), grid.levels - 1)


def slow_qronos(weight, quantized, analog, grid):
    """Each code by least squares over the samples: the best given the later weights, which are then solved again."""
    rows, depth = weight.shape
    codes = torch.empty(rows, depth, dtype=torch.int64)
    for row in range(rows):
        later, goal = weight[row].clone(), analog @ weight[row]
        for t in range(depth):
            left = goal - quantized[:, t + 1 :] @ later[t + 1 :]
            column = quantized[:, t]
            codes[row, t] = nearest((column @ left / (column @ column)).item(), grid, row)
            value = (codes[row, t] - grid.zero_point[row]) * grid.scale[row]
            goal = goal - value * column
            if t + 1 < depth:
                later[t + 1 :] = torch.linalg.lstsq(quantized[:, t + 1 :], goal[:, None]).solution[:, 0]
    return codes


def slow_gptq(weight, gram, grid):
    """Optimal brain quantization in fixed order: each error spread over the later weights by what is left to invert."""
    rows, depth = weight.shape
    left, codes = weight.clone(), torch.empty(rows, depth, dtype=torch.int64)
    for t in range(depth):
        inverse = torch.linalg.inv(gram[t:, t:])
        for row in range(rows):
            codes[row, t] = nearest(left[row, t].item(), grid, row)
            value = (codes[row, t] - grid.zero_point[row]) * grid.scale[row]
            left[row, t:] -= (left[row, t] - value) / inverse[0, 0] * inverse[0]
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_gptq_and_qronos_are_their_definitions(bits, block_size):
    weight, quantized, analog, gram, cross = problem(bits)
    grid = mse_grid(weight, 2**bits, gram.diagonal())
    # Less damping than float64 resolves.
    codes = GPTQ(damping=1e-30, block_size=block_size)(Problem(weight, gram, cross, grid))
    assert torch.equal(codes.long(), slow_gptq(weight, gram, grid))
    codes = Qronos(damping=1e-30, block_size=block_size)(Problem(weight, gram, cross, grid))
    assert torch.equal(codes.long(), slow_qronos(weight, quantized, analog, grid))


@pytest.mark.parametrize("solver", [GPFQ(), SPFQ(), GPTQ(), Qronos()])
@pytest.mark.parametrize("dead", [(0,), (5, 29), tuple(range(30))])
def test_columns_without_inputs_take_zero(solver, dead):
    weight, *_, gram, cross = problem(1, dead=dead)
    grid = mse_grid(weight, 4)
    codes = solver(Problem(weight, gram, cross, grid))
    assert codes.dtype == torch.uint8
    assert (codes[:, list(dead)] == grid.zero_point[:, None]).all()
    single = solver(Problem(weight.float(), gram.float(), cross.float(), mse_grid(weight.float(), 4)))
    assert (single[:, list(dead)] == grid.zero_point[:, None]).all()


def test_every_solver_beats_rounding_and_qronos_sees_the_mismatch():
    weight, *_, gram, cross = problem(2, rows=40, depth=60, samples=600)
    task = Problem(weight, gram, cross, mse_grid(weight, 4, gram.diagonal()))
    errors = {solver.name: task.error(solver(task)).sum().item() for solver in (RTN(), GPFQ(), GPTQ(), Qronos())}
    assert max(errors, key=errors.get) == "rtn"
    assert errors["qronos"] < errors["gptq"]


def test_stochastic_rounding_is_seeded_and_right_on_average():
    weight, *_, gram, cross = problem(3)
    task = Problem(weight, gram, cross, mse_grid(weight, 16))
    assert torch.equal(SPFQ(seed=4)(task), SPFQ(seed=4)(task))
    assert not torch.equal(SPFQ(seed=4)(task), SPFQ(seed=5)(task))
    one = torch.tensor([[0.3]], dtype=torch.float64).repeat(20_000, 1)
    unit = Grid(torch.ones(20_000, dtype=torch.float64), torch.full((20_000,), 2), 4)
    codes = SPFQ()(Problem(one, torch.ones(1, 1).double(), torch.ones(1, 1).double(), unit))
    assert set(codes.unique().tolist()) == {2, 3}
    assert (codes.double().mean() - 2).item() == pytest.approx(0.3, abs=0.015)


def slow_sparse(weight, quantized, analog, grid, soft, hard):
    rows, depth = weight.shape
    codes = torch.empty(rows, depth, dtype=torch.int64)
    for row in range(rows):
        u = torch.zeros(analog.shape[0], dtype=torch.float64)
        for t in range(depth):
            u = u + weight[row, t] * analog[:, t]
            value = (quantized[:, t] @ u / (quantized[:, t] @ quantized[:, t])).item()
            value = max(abs(value) - soft, 0.0) * (1 if value > 0 else -1)
            value = 0.0 if abs(value) <= hard else value
            codes[row, t] = nearest(value, grid, row)
            u = u - (codes[row, t] - grid.zero_point[row]) * grid.scale[row] * quantized[:, t]
    return codes


@pytest.mark.parametrize(("soft", "hard"), [(0.3, 0.0), (0.0, 0.5), (0.2, 0.4)])
def test_thresholds_are_those_of_the_sparse_algorithm(soft, hard):
    weight, quantized, analog, gram, cross = problem(4)
    grid = mse_grid(weight, 16)
    task = Problem(weight, gram, cross, grid)
    codes = GPFQ(soft, hard)(task)
    assert torch.equal(codes.long(), slow_sparse(weight, quantized, analog, grid, soft, hard))
    zeros = (codes == grid.zero_point[:, None]).sum()
    assert zeros > 1.3 * (GPFQ()(task) == grid.zero_point[:, None]).sum()


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("start", [RTN(), GPFQ(), Qronos()])
def test_descent_never_raises_the_error_and_ends_where_no_single_code_helps(bits, start):
    weight, *_, gram, cross = problem(5 + bits, dead=(3,))
    grid = mse_grid(weight, 2**bits, gram.diagonal())
    task = Problem(weight, gram, cross, grid)
    codes = start(task)
    errors = [task.error(codes)]
    for _ in range(3):
        codes, same = refine_codes(task, codes, sweeps=1, block_size=7)
        assert same is grid
        errors.append(task.error(codes))
        assert (errors[-1] <= errors[-2] + 1e-9).all()
    for _ in range(50):
        codes, _ = refine_codes(task, codes, sweeps=1)
    least, final = task.error(codes), codes
    for t in range(weight.shape[1]):
        for code in {0, grid.levels - 1, *final[:, t].tolist()}:
            other = final.clone()
            other[:, t] = code
            assert (task.error(other) >= least - 1e-9).all()


def test_search_finds_the_best_of_its_scales_row_by_row():
    weight, *_, gram, cross = problem(20)
    grid, factors = mse_grid(weight, 4), (0.6, 0.8, 1.0, 1.3)
    codes, found = search_scales(Problem(weight, gram, cross, grid), GPFQ(), factors)
    errors = []
    for factor in factors:
        task = Problem(weight, gram, cross, Grid(grid.scale * factor, grid.zero_point, 4))
        errors.append(task.error(GPFQ()(task)))
    torch.testing.assert_close(Problem(weight, gram, cross, found).error(codes), torch.stack(errors).amin(0))


def test_refitted_scales_are_the_best_for_their_codes():
    weight, *_, gram, cross = problem(21)
    grid = mse_grid(weight, 4)
    codes = GPFQ()(Problem(weight, gram, cross, grid))
    codes[0] = grid.zero_point[0]  # a row of zeros has no best scale
    z = codes.double() - grid.zero_point[:, None]
    fitted = refit_scales(grid, ((weight @ cross.T) * z).sum(1), ((z @ gram) * z).sum(1))
    assert fitted.scale[0] == grid.scale[0]
    least = Problem(weight, gram, cross, fitted).error(codes)
    for factor in (0.9, 0.99, 1.01, 1.1):
        other = Grid(fitted.scale * factor, grid.zero_point, 4)
        assert (Problem(weight, gram, cross, other).error(codes)[1:] > least[1:]).all()
    assert (least <= Problem(weight, gram, cross, grid).error(codes) + 1e-9).all()


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("start", [RTN(), GPFQ(), Qronos()])
def test_a_lookahead_never_raises_the_error_of_a_row_and_lowers_it_more_than_descent(bits, start):
    weight, *_, gram, cross = problem(5 + bits, dead=(3,))
    task = Problem(weight, gram, cross, mse_grid(weight, 2**bits, gram.diagonal()))
    before = task.error(start(task))
    descended, _ = refine_codes(task, start(task), sweeps=1)
    for _ in range(3):
        descended, _ = refine_codes(task, descended, sweeps=1)
    ahead, _ = refine_codes(task, start(task), sweeps=4, block_size=7)
    assert (task.error(ahead) <= before + 1e-9).all()
    assert task.error(ahead).sum() < task.error(descended).sum()


@pytest.mark.parametrize("shared", [False, True])
def test_scales_are_refitted_to_the_codes_of_each_sweep(shared):
    weight, *_, gram, cross = problem(22, dead=(3,))
    grid = mse_grid(weight, 8)
    task = Problem(weight, gram, cross, grid)
    start = RTN()(task)
    codes, found = refine_codes(task, start, sweeps=1, refit=True, shared=shared)
    assert torch.equal(codes, refine_codes(task, start, sweeps=1)[0])
    z = codes.double() - grid.zero_point[:, None]
    expected = refit_scales(grid, ((weight @ cross.T) * z).sum(1), ((z @ gram) * z).sum(1), shared)
    assert not torch.equal(found.scale, grid.scale)
    torch.testing.assert_close(found.scale, expected.scale)
    codes, found = refine_codes(task, start, sweeps=4, refit=True, shared=shared)
    fitted = Problem(weight, gram, cross, found)
    assert fitted.error(codes).sum() < task.error(refine_codes(task, start, sweeps=4)[0]).sum()


SMALL_BLOCKS = [GPFQ(block_size=16), GPTQ(block_size=16), Qronos(block_size=16)]


@pytest.mark.parametrize("solver", [RTN(), *SMALL_BLOCKS])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_grid_of_several_candidates_gets_the_answer_of_each(solver, pruned):
    weight, *_, gram, cross = problem(23, depth=40, dead=(5,))
    mask = None
    if pruned:
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
        weight = weight * mask
    grid = mse_grid(weight, 4)
    grids = [Grid(grid.scale * factor, grid.zero_point, 4) for factor in (0.7, 1.0, 1.2)]
    tasks = [Problem(weight, gram, cross, each, mask) for each in grids]
    alone = [solver(task) for task in tasks]
    several = Grid(torch.cat([each.scale for each in grids]), grid.zero_point.repeat(3), 4)
    together = Problem(weight, gram, cross, several, mask)
    codes = solver(together)
    assert torch.equal(codes, torch.cat(alone))
    errors = [task.error(answer) for task, answer in zip(tasks, alone, strict=True)]
    torch.testing.assert_close(together.error(codes), torch.cat(errors))


@pytest.mark.parametrize("solver", [GPFQ(), GPFQ(soft_threshold=0.1, hard_threshold=0.2)])
@pytest.mark.parametrize("refinement", [Refinement(), Refinement(scale_candidates=5, sweeps=1, refit=True)])
@pytest.mark.parametrize("pruned", [False, True])
def test_rows_with_inputs_of_their_own_get_the_answers_that_each_gets_alone(solver, refinement, pruned):
    each = [problem(seed, rows=1, depth=9, dead=(seed % 9,) if seed % 2 else ()) for seed in range(7)]
    weight, gram, cross = (torch.stack([one[part] for one in each]) for part in (0, 3, 4))
    weight, mask = weight[:, 0], None
    if pruned:
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.4
        weight = weight * mask
    grid = mse_grid(weight, 4)
    together = Problem(weight, gram, cross, grid, mask)
    codes, chosen = refinement(solver, together)
    errors = Problem(weight, gram, cross, chosen).error(codes)
    for row in range(7):
        one = slice(row, row + 1)
        alone = Problem(weight[one], gram[row], cross[row], grid.rows(one), None if mask is None else mask[one])
        expected, scales = refinement(solver, alone)
        assert torch.equal(codes[one], expected)
        torch.testing.assert_close(chosen.scale[one], scales.scale)
        error = Problem(weight[one], gram[row], cross[row], scales).error(expected)
        torch.testing.assert_close(errors[one], error)


def test_spfq_rounds_the_rows_of_a_depthwise_convolution_independently():
    weight, grid = torch.full((2000, 1), 0.5), Grid(torch.ones(2000), torch.full((2000,), 2, dtype=torch.int32), 4)
    ones = torch.ones(2000, 1, 1)
    codes = SPFQ()(Problem(weight, ones, ones, grid))
    assert abs(codes.float().mean() - 2.5) < 0.05


@pytest.mark.parametrize("shared", [False, True])
def test_a_convolution_of_many_groups_is_solved_as_its_groups_are(monkeypatch, shared):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3, padding=1, groups=12), nn.Conv2d(24, 5, 1)
    )
    options = {"refinement": Refinement(1, 3), "grid": GridOptions(granularity="layer" if shared else "channel")}
    images = [torch.randn(8, 3, 9, 9)]
    together = quantize(network, images, 3, **options)
    monkeypatch.setattr("compress.quantization.layer.APART", 0)
    apart = quantize(network, images, 3, **options)
    assert torch.equal(together.layers["2"].codes, apart.layers["2"].codes)
    assert len(set(together.layers["2"].grid.scale.tolist())) == (1 if shared else 24)


def test_the_error_of_a_deep_layer_is_that_of_its_outputs():
    weight, quantized, analog, gram, cross = problem(24, depth=1100, samples=50)
    grid = mse_grid(weight, 4)
    task = Problem(weight, gram, cross, grid)
    codes = RTN()(task)
    goal = analog @ weight.T
    exact = (goal - quantized @ grid.dequantize(codes).T).square().sum(0)
    torch.testing.assert_close(Problem(weight, gram, cross, grid).error(codes) + goal.square().sum(0), exact)
