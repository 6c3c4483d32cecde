"""Networks by name: their layouts, sizes, shapes and what the builder refuses."""

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.models import available, build, catalogue, check_options

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SMALL, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
CIFAR = {f"resnet{depth}": (depth, SMALL) for depth in (8, 20, 32, 44, 56, 110)}
CIFAR |= {"resnet8x4": (8, WIDE), "resnet32x4": (32, WIDE)}
WRN = {"wrn_16_1": (16, 1), "wrn_16_2": (16, 2), "wrn_40_1": (40, 1), "wrn_40_2": (40, 2)}
TORCHVISION = {"resnet18": (18, [2, 2, 2, 2]), "resnet34": (34, [3, 4, 6, 3]), "resnet50": (50, [3, 4, 6, 3])}


@pytest.fixture(params=[*CIFAR, *WRN, *TORCHVISION])
def stem(request):
    return request.param


def conv(shapes, name, out_channels, in_channels, size):
    shapes[f"{name}.weight"] = (out_channels, in_channels, size, size)


def norm(shapes, name, channels):
    shapes.update({f"{name}.{key}": () if key == "num_batches_tracked" else (channels,) for key in BATCH_NORM})


def linear(shapes, name, out_features, in_features):
    shapes.update({f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)})


def cifar_layout(depth, widths, classes):
    shapes, channels = {}, widths[0]
    conv(shapes, "conv1", channels, 3, 3)
    norm(shapes, "bn1", channels)
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            name, out = f"layer{stage}.{block}", widths[stage]
            conv(shapes, f"{name}.conv1", out, channels, 3)
            norm(shapes, f"{name}.bn1", out)
            conv(shapes, f"{name}.conv2", out, out, 3)
            norm(shapes, f"{name}.bn2", out)
            if block == 0 and (stage > 1 or channels != out):
                conv(shapes, f"{name}.downsample.0", out, channels, 1)
                norm(shapes, f"{name}.downsample.1", out)
            channels = out
    linear(shapes, "fc", classes, channels)
    return shapes


def wide_layout(depth, factor, classes):
    shapes, channels = {}, 16
    conv(shapes, "conv1", 16, 3, 3)
    for stage in (1, 2, 3):
        for block in range((depth - 4) // 6):
            name, out = f"block{stage}.layer.{block}", 16 * factor * 2 ** (stage - 1)
            norm(shapes, f"{name}.bn1", channels)
            conv(shapes, f"{name}.conv1", out, channels, 3)
            norm(shapes, f"{name}.bn2", out)
            conv(shapes, f"{name}.conv2", out, out, 3)
            if channels != out:
                conv(shapes, f"{name}.convShortcut", out, channels, 1)
            channels = out
    norm(shapes, "bn1", channels)
    linear(shapes, "fc", classes, channels)
    return shapes


def torchvision_layout(depth, blocks, classes):
    shapes, channels, expansion = {}, 64, 4 if depth == 50 else 1
    conv(shapes, "conv1", 64, 3, 3)
    norm(shapes, "bn1", 64)
    for stage in (1, 2, 3, 4):
        width = 64 * 2 ** (stage - 1)
        for block in range(blocks[stage - 1]):
            name, out = f"layer{stage}.{block}", width * expansion
            layers = [(width, channels, 3), (width, width, 3)]
            if expansion == 4:
                layers = [(width, channels, 1), (width, width, 3), (out, width, 1)]
            for index, layer in enumerate(layers, start=1):
                conv(shapes, f"{name}.conv{index}", *layer)
                norm(shapes, f"{name}.bn{index}", layer[0])
            if block == 0 and channels != out:
                conv(shapes, f"{name}.downsample.0", out, channels, 1)
                norm(shapes, f"{name}.downsample.1", out)
            channels = out
    linear(shapes, "fc", classes, channels)
    return shapes


def layout(stem, classes):
    if stem in CIFAR:
        return cifar_layout(*CIFAR[stem], classes)
    return wide_layout(*WRN[stem], classes) if stem in WRN else torchvision_layout(*TORCHVISION[stem], classes)


def test_every_architecture_has_a_file_and_every_file_is_tested():
    assert available() == tuple(sorted({*CIFAR, *WRN, *TORCHVISION}))


def test_keys_and_shapes_are_those_of_the_published_checkpoints(stem):
    model = build(stem, 100)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == layout(stem, 100)


def test_logits_come_out_for_images_of_32_and_8_pixels(stem):
    model = build(stem, 7)
    assert model.training
    for size in (32, 8):
        logits = model(torch.randn(2, 3, size, size))
        assert logits.shape == (2, 7)
        assert torch.isfinite(logits).all()


def test_a_trace_computes_what_the_model_computes(stem):
    model = build(stem, 5).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))


def test_one_block_is_computed_by_hand():
    torch.manual_seed(0)
    block = build("resnet8x4", 10).eval().layer2[0]
    wide = build("wrn_16_2", 10).eval().block2.layer[0]
    bn, relu, convolve = nn.functional.batch_norm, nn.functional.relu, nn.functional.conv2d

    def scaled(x, module):
        return bn(x, module.running_mean, module.running_var, module.weight, module.bias)

    with torch.no_grad():
        for module in [*block.modules(), *wide.modules()]:
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.uniform_(0.5, 1.5)
        x = torch.randn(2, 64, 8, 8)
        y = scaled(convolve(x, block.conv1.weight, stride=2, padding=1), block.bn1)
        y = scaled(convolve(relu(y), block.conv2.weight, padding=1), block.bn2)
        shortcut = scaled(convolve(x, block.downsample[0].weight, stride=2), block.downsample[1])
        torch.testing.assert_close(block(x), relu(y + shortcut))

        x = torch.randn(2, 32, 8, 8)
        activated = relu(scaled(x, wide.bn1))
        y = scaled(convolve(activated, wide.conv1.weight, stride=2, padding=1), wide.bn2)
        y = convolve(relu(y), wide.conv2.weight, padding=1)
        torch.testing.assert_close(wide(x), y + convolve(activated, wide.convShortcut.weight, stride=2))


@pytest.mark.parametrize("stem", ["resnet18", "resnet20", "wrn_16_1"])
@pytest.mark.parametrize("option", ["dropout", "input_dropout"])
def test_dropout_is_random_in_training_and_absent_in_evaluation(stem, option):
    torch.manual_seed(0)
    model, images = build(stem, 10, **{option: 0.5}), torch.randn(4, 3, 16, 16)
    assert set(model.state_dict()) == set(layout(stem, 10))
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
        model.eval()
        plain = build(stem, 10).eval()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model(images), plain(images))


def test_dropout_before_the_classifier_zeroes_pooled_features():
    torch.manual_seed(0)
    for stem, last_stage in (("resnet18", "layer4"), ("resnet20", "layer3")):
        model, seen = build(stem, 10, dropout=0.25), []
        model.get_submodule(last_stage).register_forward_hook(lambda *hooked: torch.ones_like(hooked[2]))
        model.fc.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        model(torch.randn(64, 3, 8, 8))
        torch.testing.assert_close(seen[0].unique(), torch.tensor([0, 1 / 0.75]))
        assert (seen[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.04)


def test_dropout_of_a_wide_network_lies_between_the_convolutions_of_its_blocks():
    torch.manual_seed(0)
    block, seen = build("wrn_16_1", 10, dropout=0.25).block2.layer[0], []
    block.relu2.register_forward_hook(lambda *hooked: torch.ones_like(hooked[2]))
    block.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(torch.randn(16, 16, 16, 16))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_convolutions_start_with_the_variance_of_their_family():
    torch.manual_seed(0)
    for stem, name in (("resnet32x4", "layer3.0.conv2"), ("wrn_40_2", "block3.layer.0.conv2"), ("resnet18", "conv1")):
        weight = build(stem, 10).get_submodule(name).weight
        assert weight.std().item() == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.05)


def test_options_replace_keys_of_the_file():
    assert len(build("resnet20", 10, depth=14).layer1) == 2
    assert check_options("resnet20", {"dropout": "0.25"}, "student")["dropout"] == 0.25


@pytest.mark.parametrize(
    ("stem", "options", "message"),
    [
        ("resnet99", {}, "student/model: found 'resnet99'; accepted: resnet110, resnet18, "),
        ("../method/kd", {}, "student/model: found '../method/kd'; accepted: resnet110, "),
        ("resnet20", {"width": 3}, "resnet20.width: found an unknown key; accepted: depth, widths, dropout, input_d"),
        ("resnet20", {"depth": 21}, "resnet20.depth: found 21; accepted: 6n + 2, such as 8"),
        ("resnet20", {"widths": [16, 16, 32]}, "resnet20.widths: found [16, 16, 32]; accepted: a list of 4 elements"),
        ("wrn_16_2", {"depth": 17}, "wrn_16_2.depth: found 17; accepted: 6n + 4, such as 16"),
        ("resnet18", {"depth": 19}, "resnet18.depth: found 19; accepted: 18, 34, 50"),
        ("resnet18", {"dropout": 1.0}, "resnet18.dropout: found 1.0; accepted: a number of at least 0 and less than 1"),
    ],
)
def test_a_wrong_name_or_option_is_named_in_one_line(stem, options, message):
    with pytest.raises(UserError) as failure:
        build(stem, 10, **options)
    assert str(failure.value).startswith(message)
    assert "\n" not in str(failure.value)


def test_the_checker_names_the_role_that_it_is_given():
    with pytest.raises(UserError, match=r"^peer\.depth: found 'deep'; accepted: a whole number$"):
        check_options("resnet20", {"depth": "deep"}, "peer")
    with pytest.raises(UserError, match=r"^peer: found 'resnet99'"):
        check_options("resnet99", {}, "peer")


def test_options_cannot_name_code():
    assert type(build("resnet20", 10, _target_="os.getcwd")).__name__ == "CifarResNet"
    with pytest.raises(UserError, match=r"resnet20\.widths"):
        build("resnet20", 10, widths={"_target_": "os.getcwd"})


def test_a_new_file_is_a_new_model(tmp_path, monkeypatch):
    text = "_target_: torchvision.models.squeezenet1_1\nweights: null\ndropout: 0.25\n"
    (tmp_path / "squeezenet.yaml").write_text(text)
    (tmp_path / "broken.yaml").write_text("defaults: [resnet20]\n")
    monkeypatch.setattr(catalogue, "FOLDER", tmp_path)
    assert available() == ("broken", "squeezenet")
    model = build("squeezenet", 6)
    assert model.classifier[0].p == 0.25
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 6)
    with pytest.raises(UserError, match=r"^conf/model/broken\.yaml: found defaults; accepted: _target_"):
        build("broken", 6)
