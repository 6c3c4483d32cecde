"""Errors of rows that make up for each other: their objective, its minimum, and what the coupling is measured from."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.quantization import coupled_rows
from compress.quantization.coupled_rows import CoupledRows
from compress.quantization.logit_sensitivity import TEMPERATURE, _gradient_products, measure
from compress.quantization.preparation import prepare
from compress.quantization.rate_distortion import Part, entropy, solve_for_price


def problem(rows=24, columns=30, seed=0, rank=4):
    """(weight, gram, coupling), float64; the logits see `rank` directions of the outputs more than all others."""
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draws, dtype=torch.float64)
    inputs = torch.randn(400, columns, generator=draws, dtype=torch.float64)
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    seen = torch.randn(rows, rank, generator=draws, dtype=torch.float64)
    coupling = seen @ seen.T + 0.3 * torch.eye(rows, dtype=torch.float64)
    return weight, inputs.T @ inputs, coupling / torch.linalg.slogdet(coupling).logabsdet.div(rows).exp()


def error(codes, step, weight, gram, coupling):
    difference = step * codes.double() - weight
    return float((coupling @ difference @ gram * difference).sum())


def test_the_error_that_counts_is_smaller_at_equal_bits():
    weight, gram, coupling = problem()

    def found(price, between=None):
        [codes], step = solve_for_price([Part(weight, gram, gram, None, between)], price, sweeps=4)
        return entropy([codes]), math.log(error(codes, step, weight, gram, coupling))

    alone = sorted(found(2.0**octave) for octave in range(-2, 12))
    for price in (1.0, 8.0, 64.0):
        bits, least = found(price, coupling)
        assert least < np.interp(bits, *zip(*alone, strict=True)) + math.log(0.8)


def test_rows_that_are_not_coupled_are_as_without(monkeypatch):
    weight, gram, _ = problem()
    [alone], step = solve_for_price([Part(weight, gram, gram)], 4.0, sweeps=4)
    for together in (1, 5, 64):
        monkeypatch.setattr(coupled_rows, "LEAST", together)
        [codes], other = solve_for_price([Part(weight, gram, gram, None, torch.eye(24).double())], 4.0, sweeps=4)
        assert torch.equal(codes, alone)
        assert other == pytest.approx(step, rel=1e-9)


def test_rows_with_grams_of_their_own_count_by_the_diagonal():
    draws = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 9, generator=draws, dtype=torch.float64)
    inputs = torch.randn(6, 9, 200, generator=draws, dtype=torch.float64)
    grams = inputs @ inputs.transpose(1, 2)
    counts = torch.rand(6, generator=draws, dtype=torch.float64) + 0.5
    together, step = solve_for_price([Part(weight, grams, grams, None, counts.diag())], 3.0, 3)
    groups = [Part(weight[row : row + 1], grams[row], grams[row], None, counts[row].view(1, 1)) for row in range(6)]
    apart, other = solve_for_price(groups, 3.0, 3)
    assert torch.equal(together[0], torch.cat(apart))
    assert step == pytest.approx(other, rel=1e-9)
    without, _ = solve_for_price([Part(weight, grams, grams)], 3.0, 3)
    assert not torch.equal(together[0], without[0])


def test_pruned_weights_stay_zero():
    weight, gram, coupling = problem()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.6
    for survivors in (1, 3):
        [codes], _ = solve_for_price([Part(weight * mask, gram, gram, mask, coupling)], 0.5, 3, survivors=survivors)
        assert not codes[~mask].any()
        assert codes[mask].any()


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("together", [1, 4, 24])
def test_rows_of_real_numbers_reach_the_least_error(way, fine, together, monkeypatch):
    """Each row takes what is best for it; with a hardly noticeable ridge one pass is enough, where rows are alone."""
    weight, gram, coupling = problem()
    monkeypatch.setattr(coupled_rows, "LEAST", together)
    monkeypatch.setattr(coupled_rows, "SHARE", 0)
    monkeypatch.setattr(coupled_rows, "FINE", 0)
    rows = CoupledRows(coupling, 1e-9)
    codes = torch.zeros(weight.T.shape, dtype=torch.float64)
    moments = gram @ codes
    inverse = torch.linalg.inv(gram)
    errors = [error(codes.T, 1.0, weight, gram, coupling)]
    for _ in range(1 if together == 1 else 40):

        def decide(some, gradient, own):
            return codes[:, some] + inverse @ gradient

        rows.look_ahead(way, fine, codes, moments, gram @ weight.T - moments, gram, decide)
        assert torch.allclose(moments, gram @ codes)
        errors.append(error(codes.T, 1.0, weight, gram, coupling))
        assert errors[-1] <= errors[-2] + 1e-9 * errors[0]
    assert errors[-1] < (1e-6 if together == 1 else 0.03) * errors[0]


def test_coordinate_descent_never_raises_the_error(monkeypatch):
    """Of rows that move together only where each is decided as if with the energy of all."""
    weight, gram, coupling = problem(rank=1)
    for together, safe in ((1, 0.7), (8, 1.0), (24, 1.0)):
        monkeypatch.setattr(coupled_rows, "LEAST", together)
        monkeypatch.setattr(coupled_rows, "SHARE", 0)
        monkeypatch.setattr(coupled_rows, "SAFE", safe)
        rows = CoupledRows(coupling, 1e-3)
        codes = weight.T.round()
        moments = gram @ codes
        errors = [error(codes.T, 1.0, weight, gram, coupling)]
        for column in range(30):

            def decide(some, gradient, own, codes=codes, column=column):
                found = codes[:, some].clone()
                found[column] = (20 * found[column] + 20 * gradient[column] / gram[column, column]).round() / 20
                return found

            rows.sweep(codes, moments, gram @ weight.T, gram, decide)
            errors.append(error(codes.T, 1.0, weight, gram, coupling))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0]


def test_rows_that_are_nearly_the_same_do_not_run_away():
    draws = torch.Generator().manual_seed(0)
    weight, gram, _ = problem(rows=128)
    coupling = 0.5 * torch.ones(128, 128, dtype=torch.float64) + 0.5 * torch.eye(128, dtype=torch.float64)
    coupling /= torch.linalg.slogdet(coupling).logabsdet.div(128).exp()
    weight += torch.randn(1, 30, generator=draws, dtype=torch.float64)
    for price in (1.0, 100.0, 1000.0):
        costs = []
        for between in (None, coupling):
            [codes], step = solve_for_price([Part(weight, gram, gram, None, between)], price, sweeps=4)
            costs.append(error(codes, step, weight, gram, coupling) + price * entropy([codes]))
        assert costs[1] < costs[0]


class Layers(nn.Module):
    """Every kind of layer that has gradients of its own: groups, one dimension, and a matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.groups = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 12, 2, groups=2)
        self.depthwise, self.line = nn.Conv2d(12, 12, 2, groups=12), nn.Conv1d(12, 6, 2)
        self.last = nn.Linear(6, 10)

    def forward(self, images):
        x = self.depthwise(F.relu(self.groups(F.relu(self.first(images)))))
        return self.last(F.relu(self.line(x.flatten(2))).mean(2))


def test_the_coupling_is_that_of_the_gradients_of_each_image():
    torch.manual_seed(0)
    images = torch.randn(40, 3, 10, 10)
    prepared = prepare(Layers().eval(), [images])
    plain, found = measure(prepared), measure(prepared, coupled=True)
    network = prepared.analog
    products = dict.fromkeys(found, 0.0)
    drawn = torch.multinomial((network(images) / TEMPERATURE).softmax(1), 1, generator=torch.Generator().manual_seed(0))
    inputs = {}

    def keep(layer, arguments):
        inputs.setdefault(layer, arguments[0].detach())

    for name in found:
        network.get_submodule(name).register_forward_pre_hook(keep)
    network(images)
    for image, label in zip(images, drawn, strict=True):
        loss = (network(image[None]) / TEMPERATURE).log_softmax(1)[0, label[0]]
        for name in found:
            layer = network.get_submodule(name)
            weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias], retain_graph=True)
            # The gradient for inputs less their mean over all images and positions, which is that of an error whose
            # mean the bias takes back.
            seen = inputs[layer]
            if isinstance(layer, nn.Linear):
                mean = seen.mean(0).expand(len(weight), -1)
            else:
                unfolded = seen if seen.dim() == 4 else seen[:, :, None]
                kernel = layer.kernel_size if seen.dim() == 4 else (1, *layer.kernel_size)
                stride = layer.stride if seen.dim() == 4 else (1, *layer.stride)
                patches = F.unfold(unfolded, kernel, stride=stride).mean((0, 2))
                mean = patches.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1).flatten(0, 1)
            gradient = (weight.flatten(1) - bias[:, None] * mean).unflatten(0, (getattr(layer, "groups", 1), -1))
            products[name] += gradient @ gradient.mT
    for name, each in found.items():
        expected = products[name].double()
        expected = expected / expected.diagonal(dim1=1, dim2=2).mean()
        expected = (expected + torch.eye(expected.shape[1])) / 2
        ratio = each.coupling / expected
        assert float(ratio.diagonal(dim1=1, dim2=2).std()) < 1e-3 * float(ratio.diagonal(dim1=1, dim2=2).mean())
        scale = float(ratio.diagonal(dim1=1, dim2=2).mean())
        assert torch.allclose(each.coupling.double(), scale * expected, atol=1e-3 * scale)
        assert float(torch.linalg.slogdet(each.coupling.double()).logabsdet.sum()) == pytest.approx(0, abs=1e-3)
        assert each.curvature * scale == pytest.approx(plain[name].curvature, rel=1e-3)
        assert each.divergence == pytest.approx(plain[name].divergence, rel=1e-3)
        assert plain[name].coupling is None


@pytest.mark.parametrize(("rows", "columns", "places"), [(40, 30, 2), (40, 30, 1), (3, 4, 50), (30, 4, 60)])
def test_products_of_gradients_are_those_of_each_images_weight(rows, columns, places):
    draws = torch.Generator().manual_seed(0)
    slopes = torch.randn(5, 2, rows, places, generator=draws, dtype=torch.float64)
    inputs = torch.randn(2, columns, 5, places, generator=draws, dtype=torch.float64)
    found = _gradient_products(slopes, inputs)
    assert found.shape == (2, rows, rows)
    for group in range(2):
        gradients = [slopes[image, group] @ inputs[group, :, image].T for image in range(5)]
        assert torch.allclose(found[group], sum(gradient @ gradient.T for gradient in gradients))


def test_a_layer_whose_outputs_no_logit_sees_has_no_coupling():
    class Unseen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.unseen, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 10)

        def forward(self, images):
            x = self.first(images.flatten(1))
            return self.last(x + 0 * self.unseen(x))

    torch.manual_seed(0)
    found = measure(prepare(Unseen().eval(), [torch.randn(30, 6, 1, 1)]), coupled=True)
    assert found["unseen"].coupling is None
    assert found["first"].coupling is not None
    assert math.isfinite(found["unseen"].curvature)
