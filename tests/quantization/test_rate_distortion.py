"""Codes of least error plus priced bits: what a price does to one layer."""

import math

import pytest
import torch

from compress.quantization import rate_distortion
from compress.quantization.rate_distortion import CodeLengths, Part, entropy, solve_for_price, step_of


def layer(rows=24, columns=40, samples=400, seed=0):
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, columns, generator=draws) @ torch.randn(columns, columns, generator=draws) / 6
    return torch.randn(rows, columns, generator=draws), inputs.T @ inputs


def error(codes, step, weight, gram):
    difference = step * codes - weight
    return float(((difference @ gram) * difference).sum())


def test_lengths_are_those_of_an_ideal_coder_but_for_codes_that_do_not_occur():
    codes = torch.tensor([0.0] * 500 + [1.0] * 300 + [-2.0] * 200)
    lengths = CodeLengths.of([codes])
    at = {code: float(lengths.bits[code - lengths.first]) for code in (0, 1, -2, -1, 3)}
    assert at[0] == pytest.approx(1.0, abs=0.01)
    assert at[-2] == pytest.approx(math.log2(5), abs=0.02)
    assert at[-1] == at[3] > 10
    assert entropy([codes]) == pytest.approx(1000 * -sum(p * math.log2(p) for p in (0.5, 0.3, 0.2)))
    assert str(entropy([torch.zeros(5)])) == "0.0"


def nearest(lengths, values, prices, column=0):
    codes = values.clone()
    lengths.decide_block(prices)(column, codes)
    return codes


@pytest.mark.parametrize("price", [0.0, 0.02, 0.2])
def test_the_nearest_code_costs_least_of_all(price):
    codes = (3 * torch.randn(5000, generator=torch.Generator().manual_seed(0))).round()
    lengths = CodeLengths.of([codes])
    values = torch.linspace(-9, 9, 400)
    chosen = nearest(lengths, values, torch.tensor([[price]]))
    every = torch.arange(len(lengths.bits)) + lengths.first
    costs = (values[:, None] - every).square() + price * lengths.bits
    own = (values - chosen).square() + price * lengths.bits[(chosen - lengths.first).long()]
    torch.testing.assert_close(own, costs.min(1).values)


def test_each_row_may_have_a_price_of_its_own():
    lengths = CodeLengths.of([torch.tensor([0.0] * 90 + [1.0] * 10)])
    values = torch.tensor([0.6, 0.6])
    assert nearest(lengths, values, torch.tensor([[0.0, 1.0]])).tolist() == [1.0, 0.0]


def test_borders_that_do_not_fit_into_memory_at_once_are_made_one_by_one(monkeypatch):
    lengths = CodeLengths.of([(3 * torch.randn(500, generator=torch.Generator().manual_seed(0))).round()])
    prices, values = torch.tensor([[0.0], [2.0], [30.0]]), torch.linspace(-9, 9, 50)
    expected = [nearest(lengths, values, prices, column) for column in range(3)]
    monkeypatch.setattr(rate_distortion, "TOGETHER", 2)
    assert [nearest(lengths, values, prices, column).tolist() for column in range(3)] == [
        codes.tolist() for codes in expected
    ]
    assert len({codes.unique().numel() for codes in expected}) == 3


def test_a_higher_price_buys_fewer_bits_and_more_error():
    weight, gram = layer()
    found = [solve_for_price([Part(weight, gram, gram)], price, sweeps=4) for price in (0.1, 1.0, 10.0, 100.0)]
    bits = [entropy(codes) for codes, _ in found]
    errors = [error(codes[0], step, weight, gram) for codes, step in found]
    assert bits == sorted(bits, reverse=True)
    assert errors == sorted(errors)
    assert bits[0] > 2 * bits[-1]


def test_it_is_better_than_rounding_at_as_many_bits():
    weight, gram = layer()
    [codes], step = solve_for_price([Part(weight, gram, gram)], 5.0, sweeps=4)
    bits, own = entropy([codes]), error(codes, step, weight, gram)
    # Finer steps take more bits: the first that takes no fewer than the answer still has the larger error.
    for finer in torch.linspace(2.0, 0.05, 200).tolist():
        rounded = (weight / finer).round()
        if entropy([rounded]) >= bits:
            break
    assert error(rounded, finer, weight, gram) > 1.5 * own


def test_sweeps_lower_error_plus_price():
    weight, gram = layer()
    costs = []
    for sweeps in (0, 1, 6):
        [codes], step = solve_for_price([Part(weight, gram, gram)], 2.0, sweeps)
        costs.append(error(codes, step, weight, gram) + 2.0 * entropy([codes]))
    assert costs[0] > costs[1] >= 0.999 * costs[2]


@pytest.mark.parametrize(("price", "first"), [(4.0, 2.0), (4.0, 3.5), (1e-2, 2e-2)])
def test_a_price_that_changes_halfway_is_as_good_as_one_from_the_start(price, first):
    weight, gram = layer(rows=200)
    weight[0, 0] = 12.0  # a code of its own
    part, met = Part(weight, gram, gram), []

    def revise(codes):
        met.append(entropy(codes))
        return price

    [changed], step = solve_for_price([part], first, sweeps=4, revise=revise)
    [expected], expected_step = solve_for_price([part], price, sweeps=4)
    [other], _ = solve_for_price([part], first, sweeps=4)
    assert met[0] == pytest.approx(entropy([other]), rel=0.03)
    assert met[1] == pytest.approx(entropy([expected]), rel=0.03)
    assert entropy([changed]) == pytest.approx(entropy([expected]), rel=0.02)
    assert abs(entropy([changed]) - entropy([other])) > abs(entropy([changed]) - entropy([expected]))
    assert float(step * changed[0, 0]) == pytest.approx(float(expected_step * expected[0, 0]), rel=0.05)
    cost, best = (
        error(codes, each, weight, gram) + price * entropy([codes])
        for codes, each in ((changed, step), (expected, expected_step))
    )
    assert cost == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize(("sweeps", "asked"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_a_price_that_is_kept_changes_nothing(sweeps, asked):
    weight, gram = layer()
    met = []
    [kept], step = solve_for_price(
        [Part(weight, gram, gram)], 2.0, sweeps, revise=lambda codes: met.append(codes) or 2.0
    )
    [codes], expected = solve_for_price([Part(weight, gram, gram)], 2.0, sweeps)
    assert torch.equal(kept, codes)
    assert step == expected
    assert len(met) == asked


def test_blocks_do_not_change_the_answer():
    weight, gram = layer(columns=50)
    parts = [Part(weight.double(), gram.double(), gram.double())]
    [whole], step = solve_for_price(parts, 1.0, 2, block_size=64)
    [blocked], other = solve_for_price(parts, 1.0, 2, block_size=7)
    assert torch.equal(whole, blocked)
    assert step == pytest.approx(other, rel=1e-9)


def test_rows_with_grams_of_their_own_are_as_groups_are():
    draws = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 9, generator=draws, dtype=torch.float64)
    inputs = torch.randn(6, 9, 200, generator=draws, dtype=torch.float64)
    grams = inputs @ inputs.transpose(1, 2)
    together, step = solve_for_price([Part(weight, grams, grams)], 3.0, 3)
    groups = [Part(weight[row : row + 1], grams[row], grams[row]) for row in range(6)]
    apart, other = solve_for_price(groups, 3.0, 3)
    assert torch.equal(together[0], torch.cat(apart))
    assert step == pytest.approx(other, rel=1e-9)


def test_pruned_weights_stay_zero():
    weight, gram = layer()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.6
    [codes], _ = solve_for_price([Part(weight * mask, gram, gram, mask)], 0.5, sweeps=3)
    assert not codes[~mask].any()
    assert codes[mask].any()


def test_a_layer_without_inputs_or_weights_has_codes_of_zero():
    weight, gram = layer()
    [codes], step = solve_for_price([Part(weight, 0 * gram, 0 * gram)], 1.0, sweeps=2)
    assert not codes.any()
    assert step > 0
    [codes], step = solve_for_price([Part(0 * weight, gram, gram)], 1.0, sweeps=2)
    assert not codes.any()
    assert step > 0


def test_the_step_of_a_price_falls_with_the_energy_of_the_inputs():
    assert step_of(4.0, 1.0) == pytest.approx(2 * step_of(1.0, 1.0)) == pytest.approx(4 * step_of(1.0, 4.0))
