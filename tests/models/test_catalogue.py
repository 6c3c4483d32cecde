"""Networks by name: their layouts, sizes, shapes and what the builder refuses."""

import pytest
import torch
import torchvision
from torch import nn

from compress.errors import UserError
from compress.models import available, build, check_options, described
from compress.paths import searching
from compress.quantization import quantize
from compress.quantization.solvers import RTN

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SMALL, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
CIFAR = {f"resnet{depth}": (depth, SMALL) for depth in (8, 20, 32, 44, 56, 110)}
CIFAR |= {"resnet8x4": (8, WIDE), "resnet32x4": (32, WIDE), "resnet8_narrow": (8, (8, 8, 16, 32))}
WRN = {"wrn_16_1": (16, 1), "wrn_16_2": (16, 2), "wrn_40_1": (40, 1), "wrn_40_2": (40, 2)}
TORCHVISION = {"resnet18": (18, [2, 2, 2, 2]), "resnet34": (34, [3, 4, 6, 3]), "resnet50": (50, [3, 4, 6, 3])}
VGG_WIDE = (64, 128, 256, 512, 512)
# Convolutions in each stage, and their channels.
VGG = {"vgg8": (1, VGG_WIDE), "vgg13": (2, VGG_WIDE), "vgg8_narrow": (1, (16, 32, 64, 128, 128))}
# Channels, blocks, and how many times as wide the blocks are inside.
MOBILE = [(8, 1, 1), (12, 2, 6), (16, 3, 6), (32, 4, 6), (48, 3, 6), (80, 3, 6), (160, 1, 6)]
FURTHER = [*VGG, "mobilenetv2", "shufflenetv1", "shufflenetv2", "densenet121", "mobilenetv3_small"]
STEMS = [*CIFAR, *WRN, *TORCHVISION, *FURTHER]


@pytest.fixture(params=STEMS)
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


def vgg_layout(convolutions, widths, classes):
    shapes, channels = {}, 3
    for stage, out in enumerate(widths):
        for index in range(convolutions):
            name = f"block{stage}.{3 * index}"
            conv(shapes, name, out, channels, 3)
            shapes[f"{name}.bias"] = (out,)
            norm(shapes, f"block{stage}.{3 * index + 1}", out)
            channels = out
    linear(shapes, "classifier", classes, channels)
    return shapes


def mobile_layout(classes):
    shapes, channels = {}, 16
    conv(shapes, "conv1.0", 16, 3, 3)
    norm(shapes, "conv1.1", 16)
    for stage, (out, blocks, expansion) in enumerate(MOBILE):
        for block in range(blocks):
            name, inner = f"blocks.{stage}.{block}.conv", expansion * channels
            for index, layer in ((0, (inner, channels, 1)), (3, (inner, 1, 3)), (6, (out, inner, 1))):
                conv(shapes, f"{name}.{index}", *layer)
                norm(shapes, f"{name}.{index + 1}", layer[0])
            channels = out
    conv(shapes, "conv2.0", 1280, 160, 1)
    norm(shapes, "conv2.1", 1280)
    linear(shapes, "classifier.0", classes, 1280)
    return shapes


def shuffle_v1_layout(classes):
    shapes, channels = {}, 24
    conv(shapes, "conv1", 24, 3, 1)
    norm(shapes, "bn1", 24)
    for stage, (out, blocks) in enumerate(((240, 4), (480, 8), (960, 4)), start=1):
        for block in range(blocks):
            own = out if block else out - channels  # the pooled input makes up the rest
            inner, groups = own // 4, 1 if channels == 24 else 3
            layers = [(inner, channels // groups, 1), (inner, 1, 3), (own, inner // 3, 1)]
            for index, layer in enumerate(layers, start=1):
                conv(shapes, f"layer{stage}.{block}.conv{index}", *layer)
                norm(shapes, f"layer{stage}.{block}.bn{index}", layer[0])
            channels = out
    linear(shapes, "linear", classes, 960)
    return shapes


def shuffle_v2_layout(classes):
    shapes, channels = {}, 24
    conv(shapes, "conv1", 24, 3, 1)
    norm(shapes, "bn1", 24)
    for stage, (out, blocks) in enumerate(((116, 4), (232, 8), (464, 4)), start=1):
        half = out // 2
        for block in range(blocks):
            layers = [(half, half, 1), (half, 1, 3), (half, half, 1)]
            if block == 0:
                layers = [(channels, 1, 3), (half, channels, 1), (half, channels, 1), (half, 1, 3), (half, half, 1)]
            for index, layer in enumerate(layers, start=1):
                conv(shapes, f"layer{stage}.{block}.conv{index}", *layer)
                norm(shapes, f"layer{stage}.{block}.bn{index}", layer[0])
        channels = out
    conv(shapes, "conv2", 1024, 464, 1)
    norm(shapes, "bn2", 1024)
    linear(shapes, "linear", classes, 1024)
    return shapes


def torchvision_own(name, classes, **other):
    """The layout of torchvision's network, but for the shapes in `other`."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=classes)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} | other


def layout(stem, classes):
    if stem in CIFAR:
        return cifar_layout(*CIFAR[stem], classes)
    if stem in WRN:
        return wide_layout(*WRN[stem], classes)
    if stem in TORCHVISION:
        return torchvision_layout(*TORCHVISION[stem], classes)
    if stem in VGG:
        return vgg_layout(*VGG[stem], classes)
    if stem == "densenet121":
        return torchvision_own("densenet121", classes, **{"features.conv0.weight": (64, 3, 3, 3)})
    if stem == "mobilenetv3_small":
        return torchvision_own("mobilenet_v3_small", classes)
    return {"mobilenetv2": mobile_layout, "shufflenetv1": shuffle_v1_layout, "shufflenetv2": shuffle_v2_layout}[stem](
        classes
    )


def test_every_architecture_has_a_file_and_every_file_is_tested():
    # Those of timm and torchvision, and classes of the user's, are tested in files of their own.
    of_timm = {stem for stem in available() if described(stem, "student")["_target_"].endswith(".TimmModel")}
    assert available() == tuple(sorted({*STEMS, *of_timm, "module", "torchvision"}))


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


@pytest.mark.slow
@pytest.mark.parametrize("stem", FURTHER)
def test_every_layer_of_a_network_can_be_quantized(stem):
    torch.manual_seed(0)
    model = build(stem, 5).eval()
    images = torch.randn(8, 3, 8, 8)
    found = quantize(model, [images], bits=8, solver=RTN())
    assert set(found.layers) == {n for n, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert found.skipped == {}
    with torch.no_grad():
        torch.testing.assert_close(found.model(images), model(images), atol=0.05, rtol=0.1)


@pytest.mark.parametrize(
    ("stem", "names", "sides"),
    [
        ("vgg8", "block0 block1 block2 block3 block4", [32, 16, 8, 4, 4]),
        ("vgg13", "block0 block1 block2 block3 block4", [32, 16, 8, 4, 4]),
        (
            "mobilenetv2",
            "conv1 blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 blocks.5 conv2",
            [16, 16, 16, 8, 4, 4, 2, 2],
        ),
        ("shufflenetv1", "bn1 layer1 layer2 layer3", [32, 16, 8, 4]),
        ("shufflenetv2", "bn1 layer1 layer2 conv2", [32, 16, 8, 4]),
        ("densenet121", "features.conv0 features.transition1 features.transition2 features.norm5", [32, 16, 8, 4]),
        ("mobilenetv3_small", "features.0 features.1 features.2 features.4 features.12", [32, 32, 16, 8, 4]),
    ],
)
def test_an_image_of_32_pixels_shrinks_as_in_the_published_network(stem, names, sides):
    model, seen = build(stem, 10).eval(), []
    for name in names.split():
        model.get_submodule(name).register_forward_hook(lambda *hooked: seen.append(hooked[2].shape[-1]))
    model(torch.randn(1, 3, 32, 32))
    assert seen == sides


def test_vgg_pools_in_front_of_the_activation_what_the_published_network_pools_behind_it():
    torch.manual_seed(0)
    model, images = build("vgg8_narrow", 10), torch.randn(8, 3, 16, 16)
    logits = model(images)
    gradients = torch.autograd.grad(logits.square().sum(), [*model.parameters()])
    x = images
    for block in (model.block0, model.block1, model.block2):
        x = nn.functional.max_pool2d(torch.relu(block(x)), 2)
    published = model.classifier(torch.relu(model.block4(torch.relu(model.block3(x)))).mean((2, 3)))
    torch.testing.assert_close(logits, published)
    torch.testing.assert_close(gradients, torch.autograd.grad(published.square().sum(), [*model.parameters()]))


def test_channels_are_shuffled_one_from_each_group_in_turn():
    first, second = build("shufflenetv1", 10).eval().layer2[:2]
    with torch.no_grad():
        x, seen = torch.randn(1, 480, 4, 4), []
        second.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        y = second(x)
        inner = second.relu(second.bn1(second.conv1(x)))  # 3 groups of 40 channels
        assert torch.equal(seen[0][:, [0, 1, 2, 3, 119]], inner[:, [0, 40, 80, 1, 119]])
        residual = second.bn3(second.conv3(second.relu(second.bn2(second.conv2(seen[0])))))
        torch.testing.assert_close(y, torch.relu(residual + x))

        x = torch.randn(1, 240, 4, 4)
        pooled = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1)), 3, 2)
        torch.testing.assert_close(first(x)[:, 240:], torch.relu(pooled))

        halving, split = build("shufflenetv2", 10).eval().layer1[:2]
        x = torch.randn(1, 116, 4, 4)
        y = split(x)
        assert torch.equal(y[:, 0::2], x[:, :58])
        kept = split.relu(split.bn3(split.conv3(split.bn2(split.conv2(split.relu(split.bn1(split.conv1(x[:, 58:]))))))))
        torch.testing.assert_close(y[:, 1::2], kept)
        x = torch.randn(1, 24, 8, 8)
        short = torch.relu(halving.bn2(halving.conv2(halving.bn1(halving.conv1(x)))))
        torch.testing.assert_close(halving(x)[:, 0::2], short)


@pytest.mark.parametrize(
    ("stem", "option"),
    [
        *((stem, option) for stem in ("resnet18", "resnet20", "wrn_16_1") for option in ("dropout", "input_dropout")),
        *((stem, "dropout") for stem in ("vgg8", "mobilenetv2", "mobilenetv3_small")),
    ],
)
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
        ("resnet99", {}, "student/model: found 'resnet99'; accepted: bit_r50x1, densenet121, "),
        ("../method/kd", {}, "student/model: found '../method/kd'; accepted: bit_r50x1, "),
        ("resnet20", {"width": 3}, "resnet20.width: found an unknown key; accepted: depth, widths, dropout, input_d"),
        ("resnet20", {"depth": 21}, "resnet20.depth: found 21; accepted: 6n + 2, such as 8"),
        ("resnet20", {"widths": [16, 16, 32]}, "resnet20.widths: found [16, 16, 32]; accepted: a list of 4 elements"),
        ("wrn_16_2", {"depth": 17}, "wrn_16_2.depth: found 17; accepted: 6n + 4, such as 16"),
        ("resnet18", {"depth": 19}, "resnet18.depth: found 19; accepted: 18, 34, 50"),
        ("vgg8", {"widths": [64]}, "vgg8.widths: found [64]; accepted: a list of 5 elements"),
        ("mobilenetv2", {"width": 0}, "mobilenetv2.width: found 0; accepted: a number of at least 0.1"),
        ("shufflenetv1", {"dropout": 0.5}, "shufflenetv1.dropout: found an unknown key; accepted: no keys"),
        ("shufflenetv2", {"widths": [3, 2, 2, 2]}, "shufflenetv2.widths: found [3, 2, 2, 2]; accepted: a list of 4"),
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


def test_a_new_file_is_a_new_model(tmp_path):
    text = "_target_: torchvision.models.squeezenet1_1\nweights: null\ndropout: 0.25\n"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "squeezenet.yaml").write_text(text)
    (tmp_path / "model" / "broken.yaml").write_text("defaults: [resnet20]\n")
    before = available()
    with searching([tmp_path]):
        assert set(available()) == {*before, "broken", "squeezenet"}
        model = build("squeezenet", 6)
        with pytest.raises(UserError, match=r"model/broken\.yaml: found defaults; accepted: _target_"):
            build("broken", 6)
    assert available() == before
    assert model.classifier[0].p == 0.25
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 6)
