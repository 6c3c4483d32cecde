"""Columns in view of those that come after them: both ends of the ridge are methods that are known."""

import pytest
import torch

from compress.quantization.grid import Grid
from compress.quantization.lookahead import Lookahead
from compress.quantization.problem import Problem, product
from compress.quantization.solvers.error_diffusion import GPTQ
from compress.quantization.solvers.path_following import GPFQ


def layer(rows=12, columns=30, samples=200, seed=0):
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, columns, generator=draws)
    inputs = (inputs + inputs[:, :1] + 0.9 * inputs.roll(1, 1)).double()
    weight = 2 * torch.randn(rows, columns, generator=draws)
    return weight.double(), inputs.T @ inputs


def rounded(inverse):
    def decide(column, values):
        values.round_()

    return decide


def decided(weight, gram, ridge, order=None, keep=None, block_size=8):
    order = torch.arange(weight.shape[1]) if order is None else order
    lookahead = Lookahead(gram, torch.as_tensor(ridge, dtype=gram.dtype), order)
    reference = weight.T.contiguous()
    return lookahead(reference, torch.zeros_like(reference), keep, block_size, rounded).T


def whole_numbers(weight):
    return Grid(torch.ones(len(weight)), torch.full((len(weight),), 128), 256)


def test_where_the_others_stay_it_is_path_following():
    weight, gram = layer()
    expected = GPFQ()(Problem(weight, gram, gram, whole_numbers(weight))) - 128.0
    codes = decided(weight, gram, 1e9 * float(gram.diagonal().mean()))
    assert (codes == expected).double().mean() > 0.99  # the ridge is not infinite


def test_where_the_others_make_up_for_all_it_is_error_diffusion():
    weight, gram = layer()
    expected = GPTQ(damping=1e-9)(Problem(weight, gram, gram, whole_numbers(weight))) - 128.0
    # The ridge is a millionth of the sum of the diagonal at least.
    assert (decided(weight, gram, 0.0) == expected).double().mean() > 0.95


def test_a_first_pass_reaches_for_the_outputs_of_other_inputs():
    weight, gram = layer()
    cross = gram + 0.2 * torch.diag(gram.diagonal())
    reference = weight.T.contiguous()
    gradient = product(cross, reference) - product(gram, reference)
    codes = Lookahead(gram, torch.tensor(0.0).double(), torch.arange(30))(reference, gradient, None, 8, rounded)

    def error(columns):
        return float((columns * product(gram, columns)).sum() - 2 * (columns * product(cross, reference)).sum())

    assert error(codes) < error(decided(weight, gram, 0.0).T)


def test_a_view_of_what_comes_lowers_the_error_of_path_following():
    weight, gram = layer()

    def error(ridge):
        difference = decided(weight, gram, ridge * float(gram.diagonal().mean())) - weight
        return float(((difference @ gram) * difference).sum())

    assert error(0.01) < 0.8 * error(1e9)


@pytest.mark.parametrize("block_size", [1, 7, 30])
def test_neither_blocks_nor_the_numbering_of_columns_change_the_answer(block_size):
    weight, gram = layer()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    ridge = 0.1 * float(gram.diagonal().mean())
    codes = decided(weight, gram, ridge, order, block_size=block_size)
    renumbered = decided(weight[:, order], gram[order][:, order], ridge)
    assert torch.equal(codes[:, order], renumbered)


def test_rows_with_grams_of_their_own_are_as_each_by_itself():
    draws = torch.Generator().manual_seed(2)
    inputs = torch.randn(5, 9, 60, generator=draws).double()
    grams, weight = inputs @ inputs.mT, 2 * torch.randn(5, 9, generator=draws).double()
    ridge = 0.1 * grams.diagonal(dim1=1, dim2=2).mean(1)
    apart = [decided(weight[row : row + 1], grams[row], ridge[row]) for row in range(5)]
    assert torch.equal(decided(weight, grams, ridge), torch.cat(apart))


def test_columns_without_inputs_and_pruned_weights_take_zero():
    weight, gram = layer()
    gram[:, 3] = gram[3] = 0
    keep = torch.ones(30, 12).double()
    keep[5] = 0
    weight[:, 5] = 0
    codes = decided(weight, gram, 0.1 * float(gram.diagonal().mean()), keep=keep)
    assert not codes[:, 3].any()
    assert not codes[:, 5].any()
    assert codes.any(1).all()


def test_a_gram_of_few_images_has_an_answer():
    draws = torch.Generator().manual_seed(3)
    inputs = 1e3 * torch.randn(3, 200, generator=draws)  # 200 columns of rank 3, in 32 bits
    weight = torch.randn(8, 200, generator=draws)
    codes = decided(weight, inputs.T @ inputs, 0.0)
    assert codes.isfinite().all()
    assert not decided(weight, torch.zeros(200, 200), 0.0).any()


def test_a_gram_that_is_none_is_refused():
    with pytest.raises(ArithmeticError):
        Lookahead(torch.full((4, 4), torch.nan), torch.tensor(1.0), torch.arange(4))
