"""Several answers to each row in the race: one is path following, all of them find the best, and the error falls."""

import itertools

import pytest
import torch

from compress.errors import UserError
from compress.quantization import quantize, survivors
from compress.quantization.grid import Grid
from compress.quantization.lookahead import Lookahead
from compress.quantization.problem import Problem
from compress.quantization.rate_distortion import CodeLengths, Part, entropy, solve_for_price
from compress.quantization.refinement import Refinement, refine_codes
from compress.quantization.solvers import RTN


def layer(rows=12, columns=30, shared=0.9):
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, columns, generator=draws)
    inputs = (inputs + shared * inputs[:, :1] + shared * inputs.roll(1, 1)).double()
    weight = 2 * torch.randn(rows, columns, generator=draws)
    return weight.double(), inputs.T @ inputs


def nearest_two(inverse, rows):
    def choose(column, values):
        first = values.round()
        second = first + torch.where(values < first, -1.0, 1.0)
        return torch.stack([first, second]), torch.zeros(2, *values.shape, dtype=values.dtype)

    return choose


def rounded(inverse):
    def decide(column, values):
        values.round_()

    return decide


def lookahead(gram, ridge):
    return Lookahead(gram, torch.as_tensor(ridge, dtype=gram.dtype), torch.arange(gram.shape[-1]))


def decided(weight, gram, ridge, count, keep=None):
    reference = weight.T.contiguous()
    gradient = torch.zeros_like(reference)
    return lookahead(gram, ridge).with_survivors(reference, gradient, keep, count, nearest_two).T


def errors(weight, gram, codes):
    return ((codes - weight) @ gram * (codes - weight)).sum(1)


@pytest.mark.parametrize("ridge", [0.0, 50.0, 1e9])
def test_one_survivor_is_what_there_is_without(ridge):
    weight, gram = layer(columns=80)
    reference = weight.T.contiguous()
    expected = lookahead(gram, ridge)(reference, torch.zeros_like(reference), None, 16, rounded).T
    assert torch.equal(decided(weight, gram, ridge, 1), expected)


def test_with_enough_of_them_the_best_of_all_is_found():
    """Of the codes around the weight; inputs have so little in common that a third one is never better for a column."""
    weight, gram = layer(rows=5, columns=6, shared=0.4)
    found = errors(weight, gram, decided(weight, gram, 0.0, 64))
    around = torch.tensor([*itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=6)], dtype=torch.float64)
    for row, error in zip(weight, found, strict=True):
        best = errors(row, gram, row.floor() + around).min()
        assert error <= best * (1 + 1e-9)


def test_the_more_of_them_the_less_the_error():
    weight, gram = layer(rows=40, columns=60)
    sums = [errors(weight, gram, decided(weight, gram, 0.0, count)).sum() for count in (1, 2, 4, 16)]
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < 0.9 * sums[0]


def test_rows_do_not_depend_on_how_many_are_solved_together(monkeypatch):
    weight, gram = layer()
    expected = decided(weight, gram, 1.0, 4)
    monkeypatch.setattr(survivors, "TOGETHER", 4 * 30 * 5)
    assert torch.equal(decided(weight, gram, 1.0, 4), expected)


def test_a_pruned_weight_and_a_column_without_inputs_are_zero():
    weight, gram = layer()
    gram[7], gram[:, 7] = 0, 0
    weight[3, 5] = weight[:, 7] = 0
    keep = torch.ones_like(weight.T)
    keep[5, 3] = 0
    codes = decided(weight, gram, 1.0, 8, keep)
    assert codes[3, 5] == 0
    assert not codes[:, 7].any()
    assert codes.abs().sum() > 0


@pytest.mark.parametrize("price", [1.0, 10.0])
def test_a_column_takes_the_code_that_costs_least_and_its_better_neighbour(price):
    draws = torch.Generator().manual_seed(0)
    lengths = CodeLengths.of([torch.randn(4000, generator=draws).double().mul(2).round()])
    values = 3 * torch.randn(8, 50, generator=draws).double()
    prices = price * torch.tensor([[0.02], [0.01]], dtype=torch.float64)
    for column in (0, 1):
        codes, penalties = lengths.choose_block(prices)(column, values)
        known = torch.arange(len(lengths.bits)) + lengths.first
        costs = (known - values[..., None]).square() + prices[column] * lengths.bits
        assert torch.equal(codes[0], known[costs.argmin(-1)].double())
        assert ((codes[0] - codes[1]).abs() == 1).all()
        index = (codes - lengths.first).long()
        assert torch.allclose(penalties, prices[column] * lengths.bits[index])


def test_rows_with_inputs_of_their_own_get_the_answers_that_each_gets_alone():
    draws = torch.Generator().manual_seed(0)
    weight = 2 * torch.randn(6, 9, generator=draws).double()
    inputs = torch.randn(6, 50, 9, generator=draws).double()
    gram = inputs.mT @ inputs
    together = decided(weight, gram, torch.ones(6), 4)
    alone = [decided(weight[[row]], gram[row], 1.0, 4) for row in range(6)]
    assert torch.equal(together, torch.cat(alone))
    [codes], _ = solve_for_price([Part(weight, gram, gram)], 2.0, 4, survivors=4)
    assert codes.shape == weight.shape


@pytest.mark.parametrize("price", [3.0, 30.0])
def test_error_and_bits_fall_together_at_a_price(price):
    weight, gram = layer(rows=32, columns=64)

    def cost(count):
        [codes], step = solve_for_price([Part(weight, gram, gram)], price, 4, survivors=count)
        return float(errors(weight, gram, step * codes).sum()) + price * entropy([codes])

    assert cost(8) < 0.99 * cost(1)


def test_the_error_falls_at_a_width():
    weight, gram = layer(rows=32, columns=64)
    grid = Grid(torch.full((32,), 1.5), torch.full((32,), 2), 4)
    problem = Problem(weight, gram, gram, grid)
    start = RTN()(problem)

    def error(count):
        codes, fitted = refine_codes(problem, start, 4, refit=True, survivors=count)
        assert 0 <= int(codes.min()) <= int(codes.max()) <= 3
        return float(errors(weight, gram, fitted.dequantize(codes).double()).sum())

    assert error(8) < 0.97 * error(1)


def test_networks_take_the_option_and_refuse_what_is_none():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5))
    images = torch.randn(128, 3, 8, 8)
    one, eight = (
        quantize(model, [images], 2, refinement=Refinement(4, 4, True, count)).layers["3"].error for count in (1, 8)
    )
    assert eight < one
    with pytest.raises(UserError, match="survivors: found 0"):
        Refinement(survivors=0)
