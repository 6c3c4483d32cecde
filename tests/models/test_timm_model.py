"""Networks of timm: which ones, the size of their images, their keys, and what is refused."""

import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from compress.errors import UserError
from compress.export.weights import load_weights
from compress.models import available, build, check_options, count_parameters, described
from compress.models.canonical import difference
from compress.quantization import quantize
from compress.quantization.solvers import RTN

# Name in timm, pixels, parameters with 10 classes.
STEMS = {
    "bit_r50x1": ("resnetv2_50x1_bit", 224, 23_520_842),
    "vit_tiny": ("vit_tiny_patch16_224", 224, 5_717_416 - 990 * 193),
    "vit_base": ("vit_base_patch16_384", 384, 86_859_496 - 990 * 769),
    "timm": ("resnet10t", None, 4_927_618),
}
SMALL = [("bit_r50x1", 32), ("vit_tiny", 32), ("timm", None)]  # quick to compute


def test_every_file_that_names_timm_is_tested():
    assert {stem for stem in available() if described(stem, "student")["_target_"].endswith(".TimmModel")} == {*STEMS}


@pytest.mark.parametrize("stem", STEMS)
def test_keys_and_shapes_are_those_of_timm(stem):
    name, size, parameters = STEMS[stem]
    with torch.device("meta"):
        model, own = build(stem, 10), timm.create_model(name, num_classes=10)
    assert model.input_size == size
    assert count_parameters(model) == parameters
    expected = {f"network.{key}": tensor.shape for key, tensor in own.state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == expected


@pytest.mark.parametrize(("stem", "size"), SMALL)
def test_a_trace_computes_what_the_model_computes_at_8_and_32_pixels(stem, size):
    model = build(stem, 5, input_size=size).eval()
    trace = torch.fx.symbolic_trace(model)
    for pixels in (8, 32):
        images = torch.randn(2, 3, pixels, pixels)
        with torch.no_grad():
            logits = model(images)
            torch.testing.assert_close(trace(images), logits)
        assert logits.shape == (2, 5)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("name", "input_size", "expected"),
    [
        ("vit_tiny_patch16_224", None, 224),
        ("vit_tiny_patch16_224", 48, 48),
        ("resnet10t", 48, 48),
        ("resnet10t", None, 8),
    ],
)
def test_images_are_resized_where_a_size_is_given_or_the_model_has_one(name, input_size, expected):
    model, seen = build("timm", 10, name=name, input_size=input_size).eval(), []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 3, 8, 8)
    model(images)
    resized = nn.functional.interpolate(images, (expected, expected), mode="bilinear")
    torch.testing.assert_close(seen[0], resized)


@pytest.mark.slow
def test_every_weight_is_quantized_standardised_ones_too():
    images = torch.randn(8, 3, 8, 8)
    for stem, size in SMALL:
        model = build(stem, 5, input_size=size)
        found = quantize(model, [images], bits=16, solver=RTN(), first_last_bits=None)
        layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
        assert layers == set(found.layers)
        assert found.float_share < 0.02
        assert difference(found.model(images), model.eval()(images)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "network.", "student.network."])
def test_timm_files_and_our_own_are_read(prefix, tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32).state_dict()
    save_file({f"{prefix}{key}": tensor for key, tensor in source.items()}, tmp_path / "model.safetensors")
    model = build("vit_tiny", 10, input_size=32)
    load_weights(model, tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, source[key]) for key, tensor in model.network.state_dict().items())
    with pytest.raises(UserError, match="has 10 classes, the data have 7"):
        load_weights(build("vit_tiny", 7, input_size=32), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "restnet10t"},
            "timm.name: found 'restnet10t'; accepted: a name of timm without a tag, such as resnet10t, ",
        ),
        (
            {"name": "resnet10t.c3_in1k"},
            "timm.name: found 'resnet10t.c3_in1k'; accepted: a name of timm without a tag, ",
        ),
        ({"name": "hf-hub:timm/resnet10t"}, "timm.name: found 'hf-hub:timm/resnet10t'; accepted: a name of timm "),
        ({"name": "~"}, "timm.name: found '~'; accepted: a name of timm without a tag, such as resnet10t, vit_tiny"),
        ({"name": 3}, "timm.name: found 3; accepted: text"),
        ({"input_size": 0}, "timm.input_size: found 0; accepted: a whole number of at least 1 or null"),
        (
            {"name": "vit_tiny_patch16_224", "input_size": 8},
            "input_size: found 8, for which timm has no vit_tiny_patch16_224 (",
        ),
    ],
)
def test_a_wrong_name_or_size_is_named_in_one_line(options, message):
    with pytest.raises(UserError) as failure:
        build("timm", 10, **options)
    assert str(failure.value).startswith(message)
    assert "\n" not in str(failure.value)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError) as failure:
        check_options("vit_tiny", {}, "student")
    assert str(failure.value) == (
        "student.name: found 'vit_tiny_patch16_224'; "
        "accepted: a name of timm, which is not installed: pip install 'compress[timm]'"
    )
