"""The whole walk over a network, against one that runs both networks from the input again for every layer."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.errors import UserError
from compress.models.folding import fold_batch_norm
from compress.quantization import Correction, GramOptions, GridOptions, Refinement, calibration, post_training, quantize
from compress.quantization.solvers import GPFQ, GPTQ, RTN, SPFQ, Qronos

DOUBLE = GramOptions(dtype="float64", ridge=0)
SHAPE = (2, 6, 6)


class Network(nn.Module):
    """Residual and grouped convolutions, ReLU and addition in place, stride, dilation, BatchNorm after and before."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, (1, 3), padding=(0, 2), dilation=(1, 2), bias=False)
        self.pre = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(12, 5)

    def forward(self, images):
        x = self.relu(self.bn0(self.stem(images)))
        out = self.bn1(self.conv1(x))
        out = operator.iadd(out, x)
        out = out + self.conv2(F.relu_(out))
        out = self.relu(self.pre(out))
        out = self.relu(self.down(out))
        return self.fc(out.mean((2, 3)))


def make(network=Network, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = network().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def images(count=24, dtype=torch.float64, seed=9):
    return torch.randn(count, 2, 6, 7, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def inputs_of(model, name, batch):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(batch.clone())
    handle.remove()
    return seen[0]


def rows_of(layer, inputs):
    """(groups, samples, d) by torch's own unfold."""
    if isinstance(layer, nn.Linear):
        return inputs[None]
    unfolded = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return unfolded.transpose(1, 2).flatten(0, 1).unflatten(1, (layer.groups, -1)).transpose(0, 1)


def published_loop(weight, quantized, analog, scale, zero_point, levels):
    u = torch.zeros(len(weight), analog.shape[0], dtype=torch.float64)
    codes = []
    for t in range(weight.shape[1]):
        u += weight[:, t, None] * analog[:, t]
        energy = quantized[:, t].square().sum()
        value = u @ quantized[:, t] / energy if energy > 1e-20 else torch.zeros(len(weight)).double()
        codes.append((torch.round(value / scale) + zero_point).clamp(0, levels - 1))
        u -= ((codes[-1] - zero_point) * scale)[:, None] * quantized[:, t]
    return torch.stack(codes, 1).long()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_every_layers_codes_and_bias_equal_those_from_its_own_inputs(bits, bias_correction, monkeypatch):
    # Codes are chosen for scales that are not yet rounded to float16.
    monkeypatch.setattr(post_training, "FELT", 0.0)
    model, batch = make(), images()
    result = quantize(
        model, [batch], bits, grams=DOUBLE, correction=Correction(bias=bias_correction), first_last_bits=3
    )
    analog, rebuilt = fold_batch_norm(model, SHAPE), fold_batch_norm(model, SHAPE)
    assert list(result.layers) == ["stem", "conv1", "conv2", "down", "fc"]
    for name, found in result.layers.items():
        layer, target = analog.get_submodule(name), rebuilt.get_submodule(name)
        mine = rows_of(layer, inputs_of(rebuilt, name, batch))
        other = rows_of(layer, inputs_of(analog, name, batch))
        weight = layer.weight.detach().flatten(1)
        per_group = len(weight) // len(mine)
        bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.detach().clone()
        codes = []
        for group in range(len(mine)):
            rows = slice(group * per_group, (group + 1) * per_group)
            x_quantized, x_analog = mine[group], other[group]
            mean_quantized, mean_analog = x_quantized.mean(0), x_analog.mean(0)
            if bias_correction:
                x_quantized, x_analog = x_quantized - mean_quantized, x_analog - mean_analog
            scale, zero = found.grid.scale[rows], found.grid.zero_point[rows]
            codes.append(published_loop(weight[rows], x_quantized, x_analog, scale, zero, found.grid.levels))
            values = (codes[-1] - zero[:, None]) * scale[:, None]
            if bias_correction:
                bias[rows] += weight[rows] @ mean_analog - values @ mean_quantized
        assert torch.equal(found.codes.flatten(1).long(), torch.cat(codes)), name
        assert found.codes.shape == layer.weight.shape
        assert found.grid.levels == 2 ** (3 if name in ("stem", "fc") else bits) == 2**found.bits
        target.weight = nn.Parameter(found.grid.dequantize(found.codes))
        if bias_correction or layer.bias is not None:
            target.bias = nn.Parameter(bias)
        with torch.no_grad():
            before, after = layer(inputs_of(analog, name, batch)), target(inputs_of(rebuilt, name, batch))
            if layer.bias is not None:
                plain = before - (layer.bias[:, None, None] if before.dim() == 4 else layer.bias)
            else:
                plain = before
        assert found.error == pytest.approx(((after - before).norm() / plain.norm()).item(), rel=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(result.model(batch.clone()), rebuilt(batch.clone()), rtol=1e-9, atol=1e-9)


def test_the_model_and_the_callers_images_are_left_alone_by_in_place_layers():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(2, 4, 3)
            self.other = nn.Conv2d(2, 4, 3)

        def forward(self, batch):
            batch = self.relu(batch)
            out = self.conv(batch)
            batch -= out.mean()
            return self.other(batch) + out

    model, batch = make(Greedy), images()
    before, state = batch.clone(), copy.deepcopy(model.state_dict())
    # A corrected bias would leave `out` the same mean, but for rounding.
    result = quantize(model, [batch], 4, grams=DOUBLE, correction=Correction(bias=False))
    assert torch.equal(batch, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # `other` reads images from which each network has taken its own mean: shared memory would take both from one.
    analog_inputs, quantized_inputs = inputs_of(model, "other", batch), inputs_of(result.model, "other", batch)
    assert not torch.equal(analog_inputs, quantized_inputs)
    with torch.no_grad():
        expected, found = model.other(analog_inputs), result.model.other(quantized_inputs)
        plain = expected - model.other.bias[:, None, None]
    assert result.layers["other"].error == pytest.approx(((found - expected).norm() / plain.norm()).item(), rel=1e-9)


@pytest.mark.parametrize("carried", [5, 128])
@pytest.mark.parametrize("cut", [1, 7, 24])
def test_results_do_not_depend_on_how_the_images_are_cut(cut, carried, monkeypatch):
    model, batch = make(), images()
    whole = quantize(model, [batch], 3, grams=DOUBLE)
    monkeypatch.setattr(calibration, "BATCH", carried)
    parts = quantize(model, ((part, None) for part in batch.split(cut)), 3, grams=DOUBLE)
    for name, layer in whole.layers.items():
        assert torch.equal(layer.codes, parts.layers[name].codes), name
    for name, value in whole.float_state.items():
        torch.testing.assert_close(parts.float_state[name], value, rtol=1e-9, atol=1e-9)


def test_bias_correction_restores_the_mean_output_of_every_layer():
    model, batch = make(dtype=torch.float32), images(dtype=torch.float32)
    result = quantize(model, [batch], 2, first_last_bits=None)
    analog = fold_batch_norm(model, SHAPE)
    with torch.no_grad():
        for name in result.layers:
            before = analog.get_submodule(name)(inputs_of(analog, name, batch)).transpose(0, 1).flatten(1)
            after = result.model.get_submodule(name)(inputs_of(result.model, name, batch)).transpose(0, 1).flatten(1)
            torch.testing.assert_close(after.mean(1), before.mean(1), rtol=1e-3, atol=1e-4)


def test_nearest_rounding_with_max_abs_scales_is_rounding_of_the_folded_weight_and_keeps_its_biases():
    model = make(dtype=torch.float32)
    result = quantize(
        model,
        [images(4, torch.float32)],
        3,
        solver=RTN(),
        grid=GridOptions(scale="max_abs"),
        correction=Correction(bias=False),
        first_last_bits=None,
    )
    folded = fold_batch_norm(model, SHAPE)
    for name, layer in result.layers.items():
        weight = folded.get_submodule(name).weight.detach().flatten(1)
        scale = weight.abs().amax(1, keepdim=True) * (2 / 7)
        expected = scale * torch.round(weight / scale).clamp(-4, 3)
        # Scales and biases are rounded to float16, whose numbers are 2^-10 apart at most.
        torch.testing.assert_close(layer.grid.dequantize(layer.codes).flatten(1), expected, rtol=1e-3, atol=0)
    for name, value in result.float_state.items():
        torch.testing.assert_close(value, folded.state_dict()[name], rtol=1e-3, atol=1e-7)


def test_first_and_last_layers_take_their_own_bits_and_null_means_those_of_the_others():
    model, batch = make(), [images(4)]
    widths = [layer.grid.levels for layer in quantize(model, batch, 2).layers.values()]
    assert widths == [256, 4, 4, 4, 256]
    assert {layer.grid.levels for layer in quantize(model, batch, 2, first_last_bits=None).layers.values()} == {4}
    widths = [
        layer.grid.levels
        for layer in quantize(
            model, batch, 2, grid=GridOptions(alphabet="published"), first_last_bits=4
        ).layers.values()
    ]
    assert widths == [17, 5, 5, 5, 17]


def test_the_percentile_rule_gives_a_layer_one_scale():
    grid = GridOptions(alphabet="published", scale="percentile", percentile=0.5, alphabet_scalar=2.0)
    result = quantize(make(), [images(4)], 2, grid=grid)
    weight = fold_batch_norm(make(), SHAPE).conv1.weight.detach().flatten(1)
    radius = weight.abs().quantile(0.5, dim=1).mean()
    torch.testing.assert_close(result.layers["conv1"].grid.scale, (2.0 * radius / 2).expand(8), rtol=1e-3, atol=0)


def test_skipped_layers_stay_float_and_say_why():
    model, batch = make(), images(6)
    result = quantize(model, [batch], 2, skip=["conv*", "fc"])
    assert list(result.layers) == ["stem", "down"]
    assert result.layers["stem"].bits == 8
    assert result.layers["down"].bits == 2
    assert result.skipped == {"conv1": "skip: conv*", "conv2": "skip: conv*", "fc": "skip: fc"}
    folded = fold_batch_norm(model, SHAPE)
    assert torch.equal(result.model.conv1.weight, folded.conv1.weight)
    assert torch.equal(result.float_state["fc.weight"], folded.fc.weight)
    assert result.folded == [("stem", "bn0"), ("conv1", "bn1")]
    assert {"pre.running_mean", "pre.running_var", "pre.weight", "pre.bias"} <= result.float_state.keys()
    assert not any("num_batches_tracked" in name for name in result.float_state)


def test_repeated_layers_and_subclasses_are_quantized_by_the_weight_that_they_multiply():
    class Scaled(nn.Conv2d):
        def forward(self, inputs):
            return F.conv2d(inputs, 2 * self.weight, self.bias, padding=self.padding)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(3, 3)
            self.scaled, self.last = Scaled(2, 2, 3, padding=1), nn.Conv2d(2, 3, 1)

        def forward(self, batch):
            return self.last(self.scaled(self.twice(self.twice(batch))))

    model, batch = make(Odd), images(4)
    result = quantize(model, [batch], 8)
    assert list(result.layers) == ["twice", "scaled", "last"]
    assert result.skipped == {}
    weight = result.model.scaled.weight
    torch.testing.assert_close(weight, 2 * model.scaled.weight, rtol=0.05, atol=0.01)
    torch.testing.assert_close(result.model(batch), model(batch), rtol=0.05, atol=0.05)
    with pytest.raises(
        UserError, match=r"^Odd: found no layer left to quantize \(twice skip: \*, .*; accepted: Conv1d,"
    ):
        quantize(model, [batch], 4, skip=["*"])


def test_layers_of_other_kinds_are_named_with_their_share():
    class Sound(nn.Module):
        def __init__(self):
            super().__init__()
            self.wave, self.norm, self.memory, self.fc = (
                nn.Conv1d(1, 2, 3),
                nn.BatchNorm1d(2),
                nn.LSTM(6, 4),
                nn.Linear(4, 2),
            )

        def forward(self, batch):
            return self.fc(self.memory(self.norm(self.wave(batch)))[0])

    model, batch = make(Sound), torch.randn(4, 1, 8)
    result = quantize(model, [batch], 4)
    assert list(result.layers) == ["wave", "fc"]
    assert result.folded == [("wave", "norm")]
    assert result.skipped == {"memory": "is a LSTM"}
    left = sum(parameter.numel() for parameter in model.memory.parameters() if parameter.dim() > 1)
    assert result.float_share == left / (left + 1 * 2 * 3 + 4 * 2)


def test_linear_layers_over_sequences_are_quantized():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.out = nn.Linear(7, 6), nn.Linear(6, 3)

        def forward(self, batch):
            return self.out(torch.tanh(self.mix(batch))).mean((1, 2))

    model, batch = make(Sequence), images()
    result = quantize(model, [batch], 8)
    with torch.no_grad():
        torch.testing.assert_close(result.model(batch), model(batch), rtol=0.05, atol=0.05)


def test_a_one_pixel_map_quantizes_as_if_all_columns_were_summed():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, batch):
            return self.conv(torch.relu(self.stem(batch)).mean((2, 3), keepdim=True))

    model, batch = make(Narrow), images(40)
    result = quantize(model, [batch], 4, grams=DOUBLE, first_last_bits=None, correction=Correction(bias=False))
    layer = result.layers["conv"]
    mine = rows_of(model.conv, inputs_of(result.model, "conv", batch))[0]
    other = rows_of(model.conv, inputs_of(model, "conv", batch))[0]
    weight = model.conv.weight.detach().flatten(1)
    codes = published_loop(weight, mine, other, layer.grid.scale, layer.grid.zero_point, 16)
    assert torch.equal(layer.codes.flatten(1).long(), codes)
    corners = result.model.conv.weight.detach()[:, :, [0, 0, 2, 2], [0, 2, 0, 2]]
    assert torch.equal(corners, torch.zeros_like(corners))


def test_a_layer_costs_no_pass_from_the_input(monkeypatch):
    calls = []
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, batch: calls.append(self) or forward(self, batch))
    counts = []
    for depth in (4, 12):
        model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(depth)), nn.Flatten(), nn.Linear(84, 3))
        calls.clear()
        quantize(model, [images(4, torch.float32), images(4, torch.float32)], 4)
        counts.append(len(calls))
    assert counts[0] >= 2 * 4  # both networks were seen at work here, or nothing was measured
    assert counts[1] <= 3 * counts[0]  # in proportion to the layers; passes from the input would give nine times


def test_progress_is_told_every_layer_in_order():
    told = []
    quantize(make(), [images(4)], 2, progress=lambda *report: told.append(report))
    layers = ["8 bit  stem", "2 bit  conv1", "2 bit  conv2", "2 bit  down", "8 bit  fc"]
    assert told == [(number, 5, layer) for number, layer in enumerate(layers, 1)]


def test_half_precision_networks_are_quantized_in_float32():
    result = quantize(make(dtype=torch.bfloat16), [images(4, torch.float32)], 4)
    assert {value.dtype for value in result.model.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, r"^bits: found 0; accepted: a whole number from 1 to 16"),
        ({"bits": 17}, r"^bits: found 17;"),
        ({"bits": 2.0}, r"^bits: found 2\.0;"),
        ({"bits": 2, "first_last_bits": 33}, r"^first_last_bits: found 33;"),
        ({"bits": 2, "activation_bits": 9}, r"^activation_bits: found 9; accepted: a whole number from 2 to 8 or null"),
        ({"bits": 2, "grid": {"scale": "best"}}, r"^grid.scale: found 'best'; accepted: mse, max_abs, percentile"),
        ({"bits": 2, "grid": "best"}, r"^grid: found 'best'; accepted: a mapping of keys to values"),
        (
            {"bits": 2, "skip": ["conv9*"]},
            r"^skip: found 'conv9\*', which matches no layer; accepted: stem, conv1, conv2, down, fc$",
        ),
        ({"bits": 2, "calibration_batches": []}, r"^calibration images: found none"),
        ({"bits": 2, "calibration_batches": [torch.ones(1, 2, 6, 6), torch.ones(1, 2, 5, 5)]}, r"shapes \(2, 5, 5\)"),
        (
            {"bits": 2, "calibration_batches": [torch.full((2, 2, 6, 6), float("nan"))]},
            r"^stem: found inputs that are not finite",
        ),
        (
            {"bits": 2, "calibration_batches": [torch.ones(2, 3, 6, 6)]},
            r"^Network: found a forward that fails for images \(3, 6, 6\)",
        ),
    ],
)
def test_mistakes_are_said_in_one_line(arguments, message):
    arguments = {"calibration_batches": [images(4)], **arguments}
    with pytest.raises(UserError, match=message) as caught:
        quantize(make(), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_named_before_they_get_a_grid(value):
    with pytest.raises(UserError, match=r"^stem: found inputs that are not finite"):
        quantize(make(), [torch.full((2, 2, 6, 6), value)], 4, activation_bits=8)


@pytest.mark.parametrize("solver", [GPTQ, Qronos])
def test_a_damping_that_is_too_small_is_named(solver):
    with pytest.raises(UserError, match=r"^quantizer.solver.damping: found one too small .*; accepted: more"):
        quantize(make(), [images(2)], 4, solver=solver(damping=1e-18), grams=GramOptions(ridge=0))


def test_a_weight_that_is_not_finite_is_named():
    model = make()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match=r"^conv2: found a weight with values that are not finite"):
        quantize(model, [images(4)], 4)


@pytest.mark.parametrize("solver", [GPFQ(), SPFQ(), GPTQ(), Qronos()])
def test_a_refined_layer_has_no_more_error_than_the_solver_left(solver):
    model, batches = make(), [images(64)]
    plain = quantize(model, batches, 2, solver=solver, first_last_bits=None, grams=DOUBLE)
    refined = quantize(
        model, batches, 2, solver=solver, first_last_bits=None, grams=DOUBLE, refinement=Refinement(7, 3, True)
    )
    # The first layer alone has the same inputs in both; the grouped one and the rest see what came before.
    assert refined.layers["stem"].error < plain.layers["stem"].error
    assert refined.layers["fc"].error < plain.layers["fc"].error
    for name, layer in refined.layers.items():
        weight = refined.model.get_submodule(name).weight
        assert torch.equal(layer.grid.dequantize(layer.codes), weight)


def test_scales_and_biases_are_kept_in_float16_unless_that_is_felt():
    torch.manual_seed(0)
    batch = [images(16, torch.float32)]
    for bits, short in ((4, True), (16, False)):
        result = quantize(make().float(), batch, bits, first_last_bits=None)
        numbers = [layer.grid.scale for layer in result.layers.values()]
        numbers += [value for name, value in result.float_state.items() if name.endswith("bias")]
        assert all(torch.equal(value.half().float(), value) for value in numbers) == short
