"""Files of LiteRT: the codes that a network has, in int8 operators, from the file alone."""

import json
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from networks import (
    IMAGES,
    SHAPES,
    TokenMixer,
    describe,
    distance,
    logits,
    lone_convolution,
    make,
    steps,
    with_inputs,
)
from torch import nn
from torch.nn import functional as F

from compress.errors import UserError
from compress.export.litert import LiteRt
from compress.export.litert_file import FORMAT, SIGNED, UNSIGNED, GraphFile
from compress.export.litert_graph import write_graph
from compress.export.xnnpack_graph import functional, quantized_graph
from compress.pipeline.check import checked_jobs
from compress.quantization import quantize

INT4, INT8, FLOAT32 = schema.TensorType.INT4, schema.TensorType.INT8, schema.TensorType.FLOAT32
LAYERS = ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"]
NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


def written(network, path):
    classes = logits(getattr(network, "model", network), IMAGES[:1]).shape[-1]
    LiteRt().write(path, network, describe("own", classes))
    model, _ = LiteRt().read(path)
    return model


def operators(path):
    """The operators of a file: name, and for each input and output its type and its content, None without any."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes()))
    [graph] = model.subgraphs

    def about(index):
        tensor = graph.tensors[index]
        return tensor.type, model.buffers[tensor.buffer].data, tensor.quantization

    codes = [NAMES[code.builtinCode] for code in model.operatorCodes]
    return [
        (codes[one.opcodeIndex], [about(index) for index in one.inputs], about(one.outputs[0]))
        for one in graph.operators
    ]


def kernels(path):
    """For each layer the types of its input, its weight and its output."""
    return [(inputs[0][0], inputs[1][0], output[0]) for name, inputs, output in operators(path) if name in LAYERS]


WRITES, READS = (INT8, INT8, INT8), (FLOAT32, INT8, FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("network", [shape for shape in SHAPES if shape != "shufflenetv2"])
def test_a_float_network_and_weights_alone_are_exact(network, tmp_path):
    model = make(network)
    assert distance(written(model, tmp_path / "float.tflite")(IMAGES), logits(model)) < 1e-5
    for bits in (8, 4):
        quantized = quantize(model, [IMAGES], bits, first_last_bits=None)
        found = written(quantized, tmp_path / f"{bits}.tflite")
        assert distance(found(IMAGES), logits(quantized.model)) < 1e-5
    assert (
        2 * (tmp_path / "8.tflite").stat().st_size < (tmp_path / "float.tflite").stat().st_size or network in SHAPES[4:]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "levels"), [*((network, 256) for network in SHAPES), ("resnet8", 16), ("vgg8", 16), ("mobilenetv2", 16)]
)
def test_integers_compute_what_the_simulation_does(network, levels, tmp_path):
    model = make(network)
    unrounded = logits(quantize(model, [IMAGES], 8).model)
    quantized = with_inputs(quantize(model, [IMAGES], 8), levels)
    expected = logits(quantized.model)
    found = written(quantized, tmp_path / "model.tflite")
    # A code that lies in the middle of two falls either way, and moves codes of all later layers.
    for count in (1, 7, 32):
        assert distance(found(IMAGES[:count]), expected[:count]) < distance(unrounded, expected)


def test_a_layer_writes_integers_where_everything_reads_its_output_on_one_grid(tmp_path):
    """In a residual block that is the first convolution; the second one and the head write floats."""
    written(with_inputs(quantize(make("resnet8"), [IMAGES], 8)), tmp_path / "model.tflite")
    assert Counter(kernels(tmp_path / "model.tflite")) == {WRITES: 3, READS: 7}


@pytest.mark.slow
def test_files_hold_the_codes_scales_and_zero_points_of_the_network(tmp_path):
    quantized = with_inputs(quantize(make("resnet8"), [IMAGES], 8, first_last_bits=None))
    path = tmp_path / "model.tflite"
    written(quantized, path)
    assert path.stat().st_size < 1.4 * sum(layer.codes.numel() for layer in quantized.layers.values())
    layer, codes = quantized.layers["layer2.0.conv1"], None
    [(inputs, output)] = [
        (inputs, output)
        for name, inputs, output in operators(path)
        if name == "CONV_2D" and inputs[1][1].tobytes() == steps(layer)
    ]
    assert np.array_equal(inputs[1][2].scale, layer.grid.scale.numpy())
    assert not inputs[1][2].zeroPoint.any()
    for (_, codes, found), name in ((inputs[0], "layer2.0.conv1"), (output, "layer2.0.conv2")):
        grid = quantized.model.get_submodule(name).input_quantizer
        assert codes is None
        assert found.scale.tolist() == [grid.scale.item()]
        assert found.zeroPoint.tolist() == [int(grid.zero_point) - 128]


def test_narrow_weights_lie_in_half_bytes_where_no_integer_kernel_reads_them(tmp_path):
    written(quantize(make("resnet8"), [IMAGES], 4, first_last_bits=None), tmp_path / "model.tflite")
    read = [inputs[0][0] for name, inputs, _ in operators(tmp_path / "model.tflite") if name == "DEQUANTIZE"]
    assert read == [INT4] * 10


def weight_of(quantized):
    """The type of the weight of the only layer, as it is stored."""
    file = GraphFile()
    write_graph(functional(quantized_graph(quantized, (3, 8, 8), float_inputs=True), (3, 8, 8)), file)
    [stored] = [
        tensor.type for tensor in file._tensors if tensor.buffer and tensor.shape == [2, 3, 3, tensor.shape[-1]]
    ]
    return stored


@pytest.mark.parametrize(
    ("scale", "bias", "highest", "kind"),
    [
        ([0.01, 0.02], 0.7, 255, FLOAT32),
        ([0.01, 0.02], 0.7, 254, INT8),
        ([0.01, 0.02], 1e9, 254, INT8),
        ([1e-40, 0.02], 0.7, 254, FLOAT32),
    ],
)
def test_what_no_int8_holds_stays_float(scale, bias, highest, kind):
    """A step of 128 and a scale below the normal numbers, but not a bias that 32 bits do not hold beside its weight."""
    assert weight_of(lone_convolution(scale, [bias, -0.4], highest)) == kind


class Pieces(nn.Module):
    """Operators that none of the networks here has, each in a shape that LiteRT writes in another way."""

    def __init__(self):
        super().__init__()
        self.even, self.strided = nn.Conv2d(3, 8, 2, padding=1), nn.Conv2d(8, 8, 3, 2, padding=1, groups=4)
        self.spread, self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.same, self.group = nn.Conv2d(16, 8, (3, 2), padding="same"), nn.GroupNorm(2, 8)
        self.norm, self.token = nn.LayerNorm(8), nn.Parameter(torch.randn(1, 1, 8))
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 10)

    def forward(self, images):
        x = F.hardtanh(self.even(images))
        x = F.leaky_relu(self.strided(x), 0.1) + 0.5
        x = F.gelu(self.spread(x)) - F.silu(x) * 2
        x = F.max_pool2d(x, 3, 2, 1) / F.avg_pool2d(x.exp(), 3, 2, 1) + F.avg_pool2d(x, 2, 2, ceil_mode=True)
        x = F.relu6(self.group(self.same(F.hardswish(self.wide(x)))))
        x = torch.roll(F.pad(x, (1, 0, 0, 1), value=0.25), (1, 2), (2, 3))
        tokens = self.norm(torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1))
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        found = (attended @ attended.transpose(1, 2)).softmax(1) @ tokens
        return self.head(torch.tanh(found[:, 0]) + F.elu(found).amax(1) - torch.sigmoid(found[:, 1:3]).sum(1))


@pytest.mark.slow
def test_operators_of_every_shape_compute_what_torch_does(tmp_path):
    torch.manual_seed(0)
    model = Pieces().eval()
    found = written(model, tmp_path / "model.tflite")
    for count in (1, 5, 32):
        assert distance(found(IMAGES[:count]), logits(model, IMAGES[:count])) < 1e-5


class Sorter(TokenMixer):
    """An operator that is not written for LiteRT."""

    def forward(self, images):
        return super().forward(images).cumsum(1)


def test_an_unknown_operator_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"model\.tflite: found aten\.cumsum, which is not written for LiteRT; accepted"
    ):
        LiteRt().write(tmp_path / "model.tflite", Sorter().eval(), describe("own"))
    assert not list(tmp_path.iterdir())


REFUSED = [
    (
        ["quantizer.bits=[8]", "quantizer.activation_bits=8", "quantizer.grid.alphabet=published"],
        "257 levels at 8 bits",
    ),
    (["quantizer.bits=[4,9]"], "found litert with 512 levels at 9 bits; accepted: up"),
    (
        ["quantizer=gpfq", "quantizer.bits=[4]", "quantizer.activation_bits=8", "quantizer.grid.zero_point=affine"],
        "quantizer.grid.zero_point: found affine at 8 bits for export=litert",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_the_runtime_cannot_do_is_refused_before_any_work(overrides, message):
    with pytest.raises(UserError, match=message) as mistake:
        checked_jobs(["experiment=quickstart", "method=supervised", "export=litert", "quantizer=rtn", *overrides])
    assert "\n" not in str(mistake.value)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("litert") / "model.tflite"
    LiteRt().write(path, TokenMixer(), describe("own"))
    return path


def test_the_same_network_gives_the_same_bytes(file, tmp_path):
    torch.manual_seed(0)
    LiteRt().write(tmp_path / "model.tflite", TokenMixer(), describe("own"))
    assert (tmp_path / "model.tflite").read_bytes() == file.read_bytes()


def signed(content):
    """The content with the checksum that belongs to it."""
    start = content.index(SIGNED) + len(SIGNED)
    content = content[:start] + UNSIGNED + content[start + len(UNSIGNED) :]
    return content[:start] + sha256(content).hexdigest().encode() + content[start + len(UNSIGNED) :]


def test_files_that_are_damaged_or_foreign_are_refused_by_name(file, tmp_path):
    content = file.read_bytes()
    middle = len(content) // 2
    path = tmp_path / "bad.tflite"
    altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for bad, message in [
        (None, "found no such file"),
        (b"", "found a truncated file or none of the LiteRT format"),
        (b"no model at all", "found a truncated file or none of the LiteRT format"),
        (content[:middle], "found "),
        (content[:100], "found a truncated file or none of the LiteRT format"),
        (altered, "found content that does not match its checksum"),
        (content.replace(FORMAT.encode(), b"somebody-elses-id"), "found a LiteRT file without a description of its"),
        (signed(content.replace(b'"8"', b"888")), "class_names: found 10 names"),
        (signed(content.replace(b'"format"', b'"format ')), "found a description that is not a JSON object"),
        (
            signed(content.replace(b"[3,8,8]", b"[3,9,8]")),
            r"input_shape: found \[3, 9, 8\] for a network of \[3, 8, 8\]",
        ),
        (
            signed(content.replace(b'"8","9"]', b'"8"    ]')),
            "class_names: found 9 names",
        ),
    ]:
        path.unlink(missing_ok=True)
        if bad is not None:
            path.write_bytes(bad)
        with pytest.raises(UserError, match=rf"bad\.tflite: {message}.*; accepted: ") as mistake:
            LiteRt().read(path)
        assert "\n" not in str(mistake.value)


@pytest.mark.slow
def test_no_byte_of_a_file_can_be_changed_unseen(file, tmp_path):
    """Each of so many: the checksum is over all of them, also over those by which the description is found."""
    content = file.read_bytes()
    draw = np.random.default_rng(0)
    path = tmp_path / "bad.tflite"
    for place in [*range(64), *draw.integers(0, len(content), 300).tolist()]:
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << draw.integers(8))]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"bad\.tflite: .*; accepted: "):
            LiteRt().read(path)


def test_a_network_that_the_runtime_does_not_have_is_refused_though_its_checksum_holds(tmp_path):
    file = GraphFile()
    images, result = file.tensor((-1, 3, 8, 8)), file.tensor((-1, 10))
    file.operator("UNIQUE", [images], [result])
    path = tmp_path / "other.tflite"
    path.write_bytes(file.packed(images, result, describe("own").as_json()))
    with pytest.raises(UserError, match=r"other\.tflite: found a network that LiteRT cannot run \(.*\); accepted: "):
        LiteRt().read(path)


def test_the_runtime_says_nothing_on_the_terminal(file, capfd):
    model, _ = LiteRt().read(file)
    model(IMAGES)
    assert capfd.readouterr() == ("", "")


def test_a_description_inside_is_json(file):
    _, description = LiteRt().read(file)
    assert description == json.loads(json.dumps(description))
    assert description["mean"] == [0.5]


def test_a_missing_package_is_named_with_the_extra(file, uninstall, tmp_path):
    uninstall("ai_edge_litert")
    for use in (
        lambda: LiteRt().check(None),
        lambda: LiteRt().write(tmp_path / "model.tflite", TokenMixer(), describe("own")),
        lambda: LiteRt().read(file),
    ):
        with pytest.raises(UserError, match=r"^ai_edge_litert is not installed; pip install 'compress\[litert\]'$"):
            use()
    assert not list(tmp_path.iterdir())
