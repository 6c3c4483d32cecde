"""Shampoo against the formulas in float64, computed block by block with NumPy, and what an optimizer has to honour."""

import copy

import numpy as np
import pytest
import torch

from compress.errors import UserError
from compress.optim import shampoo
from compress.optim.kronecker import fold, inverse_root, join, split
from compress.optim.shampoo import Shampoo

SHAPES = {"matrix": (12, 20), "convolution": (10, 3, 3, 3), "bias": (7,), "one row": (1, 9)}


def root(factor, power, damping):
    left, values, _ = np.linalg.svd(factor, hermitian=True)
    return (left * (values + damping * values[0]) ** (-1 / power)) @ left.T


class Reference:
    """One parameter, its blocks one after the other."""

    def __init__(self, start, block, beta2=0.9, damping=1e-4, grafting="adam", interval=1, every=1):
        self.weights = start.astype(np.float64)
        matrix = self.weights.reshape(len(start), -1)
        self.order = 2 if min(matrix.shape) > 1 else 1
        self.shape = matrix.shape if self.order == 2 else (matrix.size, 1)
        starts = [range(0, side, block) for side in self.shape]
        self.blocks = [np.s_[i : i + block, j : j + block] for i in starts[0] for j in starts[1]]
        self.left, self.right, self.roots = {}, {}, {}
        self.settings = beta2, damping, grafting, interval, every
        self.squares, self.velocity = np.zeros_like(self.weights), np.zeros_like(self.weights)
        self.steps = self.updates = 0

    def step(self, gradient, lr=0.05, momentum=0.9, decay=0.1):
        grafting = self.settings[2]
        gradient = gradient.astype(np.float64)
        self.steps += 1
        self.squares = 0.999 * self.squares + 0.001 * gradient**2
        adam = gradient / (np.sqrt(self.squares / (1 - 0.999**self.steps)) + 1e-8)
        plain = {"adam": adam, "sgd": gradient, "none": gradient}[grafting]
        update = plain
        if self.order == 2 or grafting == "none":
            update = self.direction(gradient.reshape(self.shape)).reshape(gradient.shape)
            if grafting != "none":
                update = update * np.linalg.norm(plain) / np.linalg.norm(update)
        self.velocity = momentum * self.velocity + update
        self.weights = self.weights - lr * decay * self.weights - lr * self.velocity

    def direction(self, gradient):
        beta2, damping, _, interval, every = self.settings
        result = np.zeros_like(gradient)
        learns = (self.steps - 1) % every == 0
        self.updates += learns
        for index, where in enumerate(self.blocks):
            block = gradient[where]
            if learns:
                old, new = (1, 1) if beta2 == 1 else (beta2, 1 - beta2)
                self.left[index] = old * self.left.get(index, 0) + new * block @ block.T
                self.right[index] = old * self.right.get(index, 0) + new * block.T @ block
            if self.steps % interval == 0 or (self.steps < interval and self.steps in (1, 2, 4, 8, 16, 32)):
                bias = 1 if beta2 == 1 else 1 - beta2**self.updates
                sides = (self.left[index], self.right[index])
                self.roots[index] = [root(side / bias, 2 * self.order, damping) for side in sides]
            left, right = self.roots[index]
            result[where] = left @ block @ right if self.order == 2 else left @ block
        return result


def compare(dtype, block, tolerance, **settings):
    generator = torch.Generator().manual_seed(0)
    options = {"grafting": "adam", "beta2": 0.9, "damping": 1e-4, "interval": 1, "every": 1} | settings
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES.values()]
    references = [Reference(each.detach().numpy(), block, **options) for each in parameters]
    optimizer = Shampoo(
        parameters,
        lr=0.05,
        weight_decay=0.1,
        block_size=block,
        grafting=options["grafting"],
        beta2=options["beta2"],
        damping=options["damping"],
        root_interval=options["interval"],
        statistics_interval=options["every"],
    )
    for _ in range(10):
        before = [each.detach().clone() for each in parameters]
        for parameter, reference in zip(parameters, references, strict=True):
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.grad = (noise.movedim(0, -1) * torch.linspace(0.1, 2, len(noise), dtype=dtype)).movedim(-1, 0)
            reference.step(parameter.grad.numpy())
        given = [each.grad.clone() for each in parameters]
        optimizer.step()
        assert all(torch.equal(old, each.grad) for old, each in zip(given, parameters, strict=True))
        assert not any(torch.equal(old, each) for old, each in zip(before, parameters, strict=True))
        for parameter, reference in zip(parameters, references, strict=True):
            worst = np.abs(parameter.detach().numpy() - reference.weights).max()
            assert worst <= tolerance, (tuple(parameter.shape), worst)


@pytest.mark.parametrize("grafting", ["none", "sgd", "adam"])
@pytest.mark.parametrize("beta2", [1, 0.9])
@pytest.mark.parametrize("block", [256, 8])
def test_ten_steps_in_float64_are_those_of_the_formulas(block, beta2, grafting):
    compare(torch.float64, block, 1e-10, beta2=beta2, grafting=grafting)


@pytest.mark.parametrize("grafting", ["none", "sgd", "adam"])
@pytest.mark.parametrize("beta2", [1, 0.9])
@pytest.mark.parametrize("block", [256, 8])
def test_ten_steps_in_float32_are_near_those_of_the_formulas(block, beta2, grafting):
    compare(torch.float32, block, 1e-4, beta2=beta2, grafting=grafting)


@pytest.mark.parametrize(("interval", "every"), [(3, 1), (50, 1), (1, 3), (4, 2)])
def test_parameters_move_on_every_step_between_two_roots(interval, every):
    compare(torch.float64, 8, 1e-10, interval=interval, every=every)


def test_blocks_are_put_back_where_they_were():
    for rows, columns in ((5, 7), (8, 8), (16, 24), (17, 8), (3, 20)):
        matrix = torch.arange(rows * columns).view(rows, columns)
        blocks = split(matrix, 8)
        assert torch.equal(blocks[0][0], matrix[:8, :8])
        assert all(max(each.shape[1:]) <= 8 for each in blocks)
        assert torch.equal(join(blocks, rows, columns, 8), matrix)
    assert fold((64, 32, 3, 3)) == (64, 288, 2)
    assert fold((64,)) == fold((1, 64)) == fold((64, 1, 1, 1)) == (64, 1, 1)
    assert fold(()) == (1, 1, 1)


def test_roots_of_ill_conditioned_zero_and_broken_factors():
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    values = torch.logspace(0, -8, 6, dtype=torch.float64)
    exact = (basis * values.add(1e-5).pow(-0.25)) @ basis.T
    factors = torch.stack([(basis * values) @ basis.T, torch.zeros(6, 6), torch.full((6, 6), torch.nan)])
    found = inverse_root(factors, 4, 1e-5)
    torch.testing.assert_close(found[0], exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_root(factors.float(), 4, 1e-5)[0], exact.float(), rtol=0, atol=0.02)
    assert torch.equal(found[1], torch.eye(6, dtype=torch.float64))
    assert found[2].isnan().all()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.Flatten(), torch.nn.Linear(6 * 36, 4)
    return torch.nn.Sequential(*layers).to(dtype)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_saved_state_loads_without_pickle_in_its_own_precision_and_goes_on_bit_for_bit(tmp_path, dtype):
    model = network(dtype)
    optimizer = Shampoo(model.parameters(), block_size=16, root_interval=4, grafting="adam", weight_decay=0.01)
    train(model, optimizer, 6)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, 5, first=6)

    saved = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
    again = network(dtype)
    again.load_state_dict(saved["model"])
    other = Shampoo(again.parameters())
    other.load_state_dict(saved["optimizer"])
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    for state, kept in zip(other.state.values(), saved["optimizer"]["state"].values(), strict=True):
        assert state.keys() == kept.keys()
        for name, value in state.items():
            assert isinstance(value, torch.Tensor)
            assert value.dtype == (torch.int64 if name == "step" else statistics), name
            assert torch.equal(value, kept[name])
            assert value.data_ptr() != kept[name].data_ptr()
    train(again, other, 5, first=6)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, two)


def test_the_size_of_the_cache_does_not_matter(monkeypatch):
    ends = []
    for cached in (1, 250, 2**20):
        monkeypatch.setattr(shampoo, "CACHED", cached)
        model = network(torch.float64)
        train(model, Shampoo(model.parameters(), block_size=16, root_interval=3), 5)
        ends.append(list(model.parameters()))
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(ends[1], ends[2], rtol=0, atol=1e-12)


def test_an_optimizer_can_be_copied():
    model = network()
    optimizer = Shampoo(model.parameters(), root_interval=4)
    train(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, first=3)
    train(twin, other, 3, first=3)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_closure_computes_the_gradients_and_its_loss_is_returned():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Shampoo([weight], lr=0.1)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == 12
    assert optimizer.step(closure).item() < 12
    assert len(calls) == 2


def test_it_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.ones(3, 4)
    Shampoo([weight]).step()
    assert torch.equal(before, torch.get_rng_state())


def test_a_parameter_without_gradient_stays_and_catches_up_as_if_alone():
    start, gradients = torch.randn(4, 5), [torch.randn(4, 5) for _ in range(4)]
    late, busy, alone = (torch.nn.Parameter(start.clone()) for _ in range(3))
    together, single = (Shampoo(each, root_interval=3, weight_decay=0.1) for each in ([late, busy], [alone]))
    for index, gradient in enumerate(gradients):
        late.grad, busy.grad = (gradient if index % 2 else None), gradient
        before = late.detach().clone()
        together.step()
        assert torch.equal(before, late) == (index % 2 == 0)
        if index % 2:
            alone.grad = gradient
            single.step()
    torch.testing.assert_close(late, alone, rtol=0, atol=1e-6)
    assert int(together.state[late]["step"]) == 2
    assert int(together.state[busy]["step"]) == 4


def test_groups_have_options_of_their_own():
    start, gradient = torch.randn(4, 5), torch.randn(4, 5)
    options = [{"lr": 0.1, "grafting": "sgd"}, {"lr": 0.01, "weight_decay": 0.5, "block_size": 2}]
    together = [torch.nn.Parameter(start.clone()) for _ in options]
    apart = [torch.nn.Parameter(start.clone()) for _ in options]
    for each in (*together, *apart):
        each.grad = gradient.clone()
    Shampoo([{"params": [each]} | own for each, own in zip(together, options, strict=True)]).step()
    for one, two, own in zip(together, apart, options, strict=True):
        Shampoo([two], **own).step()
        assert torch.equal(one, two)
    assert not torch.equal(*together)


def test_channels_last_weights_move_as_contiguous_ones():
    start, gradient = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    plain = torch.nn.Parameter(start.clone())
    turned = torch.nn.Parameter(start.clone(memory_format=torch.channels_last))
    plain.grad, turned.grad = gradient, gradient.clone(memory_format=torch.channels_last)
    for each in (plain, turned):
        Shampoo([each]).step()
    assert torch.equal(plain, turned)


def test_gradients_of_zero_move_nothing_and_later_ones_do():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    for grafting in ("none", "sgd", "adam"):
        optimizer = Shampoo([weight], grafting=grafting)
        weight.grad = torch.zeros(3, 4)
        before = weight.detach().clone()
        optimizer.step()
        assert torch.equal(weight, before)
        weight.grad = torch.ones(3, 4)
        optimizer.step()
        assert weight.isfinite().all()
        assert not torch.equal(weight, before)


def test_a_sparse_gradient_is_a_clear_error():
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"dense.*found torch\.sparse_coo.*\(5, 3\)"):
        Shampoo(table.parameters()).step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("lr", -1), ("momentum", 1), ("beta2", 0), ("beta2", 1.1), ("grafting", "rmsprop"), ("damping", 0)],
        *[("block_size", 0), ("root_interval", 0), ("statistics_interval", 0.5), ("weight_decay", -1)],
    ],
)
def test_what_is_out_of_range_is_refused(name, value):
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match=rf"^{name}: found"):
        Shampoo([weight], **{name: value})
    with pytest.raises(UserError, match=rf"^{name}: found"):
        Shampoo([{"params": [weight], name: value}])
