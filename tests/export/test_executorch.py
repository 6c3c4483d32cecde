"""Programs of ExecuTorch: the codes that a network has, on XNNPACK's integers, from a file and the JSON beside it."""

import json
import shutil

import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from networks import (
    IMAGES,
    SHAPES,
    LateReader,
    Repeater,
    TokenMixer,
    describe,
    distance,
    logits,
    lone_convolution,
    make,
    steps,
    with_inputs,
)

from compress.checksums import file_digest
from compress.errors import UserError
from compress.export.executorch import BATCH, ExecuTorch, beside
from compress.export.xnnpack_graph import LAYERS, quantized_graph
from compress.files import read_json, write_json
from compress.pipeline.check import checked_jobs
from compress.quantization import quantize

decomposed = torch.ops.quantized_decomposed


def edited(quantized):
    return quantized_graph(quantized, (3, 8, 8))


def weights_of(graph):
    """For each layer of an edited graph, whether its weight is integers, and whether its output is written as such."""
    return [
        (
            node.args[1].target is decomposed.dequantize_per_channel.default,
            node.args[0].target is not decomposed.dequantize_per_tensor.tensor,
        )
        for node in graph.graph.nodes
        if node.target in LAYERS
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "levels"), [*((network, 256) for network in SHAPES), ("resnet8", 16), ("vgg8", 16)]
)
def test_the_graph_computes_what_the_simulation_does(network, levels):
    """Value for value, as each operator of the graph rounds where torch's simulation does, and nowhere else."""
    model = make(network)
    quantized = with_inputs(quantize(model, [IMAGES], 8), levels)
    graph = edited(quantized)
    expected = logits(quantized.model)
    changes = (logits(graph) - expected).norm(dim=1) / expected.norm(dim=1)
    # A value on the edge between two codes may become either, which an image or two will have.
    assert changes.sort().values[-3] < 2e-6
    assert changes.max() < 2e-2
    assert any(written for _, written in weights_of(graph)) or network in (TokenMixer, Repeater, LateReader)


def test_a_layer_writes_integers_where_everything_reads_its_output_on_one_grid():
    """In a residual block that is the first convolution; the second one and the head write floats."""
    graph = edited(with_inputs(quantize(make("resnet8"), [IMAGES], 8)))
    kernels = weights_of(graph)
    assert all(integers for integers, _ in kernels)
    assert sum(written for _, written in kernels) == 3
    assert len(kernels) == 10


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_programs_hold_weights_as_bytes_and_nothing_outside_of_xnnpack(bits, tmp_path):
    quantized = with_inputs(quantize(make("resnet8"), [IMAGES], bits, first_last_bits=None))
    path = tmp_path / "model.pte"
    ExecuTorch().write(path, quantized, describe("resnet8"))
    content = path.read_bytes()
    weights = sum(layer.codes.numel() for layer in quantized.layers.values())
    assert len(content) < 1.4 * weights
    [plan] = deserialize_pte_binary(content).program.execution_plan
    assert {delegate.id for delegate in plan.delegates} == {"XnnpackBackend"}
    # What these do is no computing: the size of the batch, and another shape of the same values.
    assert {operator.name for operator in plan.operators} <= {"aten::sym_size", "executorch_prim::et_view"}
    # That of a layer which writes integers has no channels more. Channels come last in it.
    layer = quantized.layers["layer2.0.conv1"]
    assert steps(layer) in content
    # A code that lies in the middle of two falls either way, and moves codes of all later layers.
    unrounded = logits(quantize(make("resnet8"), [IMAGES], bits, first_last_bits=None).model)
    expected = logits(quantized.model)
    model, _ = ExecuTorch().read(path)
    for count in (1, 7, 32):
        assert distance(model(IMAGES[:count]), expected[:count]) < 2 * distance(unrounded, expected)
    many = IMAGES.repeat(3, 1, 1, 1)[: 2 * BATCH + 1]
    assert torch.equal(model(many)[:BATCH], model(IMAGES))


def integers(quantized):
    """For each layer whether its weight is integers in the graph, which computes what the simulation does."""
    graph = edited(quantized)
    assert distance(logits(graph), logits(quantized.model)) < 1e-6
    return [kernel for kernel, _ in weights_of(graph)]


def test_what_no_int8_kernel_takes_stays_float_on_the_same_values():
    """A step of 128, a scale below the normal numbers, and a bias that 32 bits do not hold beside its weights."""
    for scale, bias, highest, expected in [
        ([0.01, 0.02], 0.7, 255, False),
        ([0.01, 0.02], 0.7, 254, True),
        ([1e-40, 0.02], 0.7, 254, False),
        ([0.01, 0.02], 1e9, 254, True),
    ]:
        assert integers(lone_convolution(scale, [bias, -0.4], highest)) == [expected]


def test_weights_beside_float_inputs_are_refused_by_the_layer(tmp_path):
    with pytest.raises(UserError, match=r"^conv1: found a quantized weight beside a float input; accepted .*2 to 8"):
        ExecuTorch().write(tmp_path / "model.pte", quantize(make("resnet8"), [IMAGES], 8), describe("resnet8"))
    assert not list(tmp_path.iterdir())


REFUSED = [
    (["quantizer.bits=[8]"], "quantizer.activation_bits: found null for export=executorch, .*accepted: 2 to 8, or exp"),
    (
        ["quantizer.bits=[8]", "quantizer.activation_bits=8", "quantizer.grid.alphabet=published"],
        "257 levels at 8 bits",
    ),
    (
        ["quantizer.bits=[4,9]", "quantizer.activation_bits=8"],
        "found executorch with 512 levels at 9 bits; accepted: up",
    ),
    (
        ["quantizer=gpfq", "quantizer.bits=[4]", "quantizer.activation_bits=8", "quantizer.grid.zero_point=affine"],
        "quantizer.grid.zero_point: found affine at 8 bits for export=executorch",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_the_runtime_cannot_do_is_refused_before_any_work(overrides, message):
    with pytest.raises(UserError, match=message) as mistake:
        checked_jobs(["experiment=quickstart", "method=supervised", "export=executorch", "quantizer=rtn", *overrides])
    assert "\n" not in str(mistake.value)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("executorch") / "model.pte"
    ExecuTorch().write(path, TokenMixer(), describe("own"))
    return path


@pytest.mark.slow
def test_the_same_network_gives_the_same_bytes(file, tmp_path):
    torch.manual_seed(0)
    ExecuTorch().write(tmp_path / "model.pte", TokenMixer(), describe("own"))
    assert (tmp_path / "model.pte").read_bytes() == file.read_bytes()
    assert beside(tmp_path / "model.pte").read_bytes() == beside(file).read_bytes()


def test_files_that_are_damaged_or_foreign_are_refused_by_name(file, tmp_path):
    content, description = file.read_bytes(), beside(file).read_text()
    middle = len(content) // 2
    altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path = tmp_path / "bad.pte"
    for bad, text, message in [
        (None, description, r"bad\.pte: found no such file"),
        (content, None, r"bad\.pte: found no bad\.pte\.json beside it"),
        (b"", description, r"bad\.pte: found content that does not match its checksum"),
        (content[:middle], description, r"bad\.pte: found content that does not match its checksum"),
        (altered, description, r"bad\.pte: found content that does not match its checksum"),
        (content, "", r"bad\.pte\.json: cannot be read"),
        (content, description[: len(description) // 2], r"bad\.pte\.json: cannot be read"),
        (content, description.replace('"8"', '"9"'), r"bad\.pte\.json: cannot be read \(its content does not match"),
        (content, "{}", r"bad\.pte\.json: found no description of a program"),
        (content, json.dumps({"format": ["x"]}), r"bad\.pte\.json: found no description of a program"),
    ]:
        path.unlink(missing_ok=True)
        beside(path).unlink(missing_ok=True)
        if bad is not None:
            path.write_bytes(bad)
        if text is not None:
            beside(path).write_text(text)
        with pytest.raises(UserError, match=message + ".*; accepted: ") as mistake:
            ExecuTorch().read(path)
        assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_shape", [3, 9, 8], r"input_shape: found \[3, 9, 8\] for a network of \[3, 8, 8\]"),
        ("class_names", ["a"], "class_names: found 1 names; accepted: one for each of the 10 outputs"),
    ],
)
def test_a_description_of_another_network_is_refused(file, key, value, message, tmp_path):
    path = tmp_path / "other.pte"
    shutil.copy(file, path)
    about = read_json(beside(file), "")
    write_json(beside(path), about | {key: value})
    with pytest.raises(UserError, match=rf"other\.pte: {message}"):
        ExecuTorch().read(path)


def test_what_is_no_program_is_refused_though_its_description_says_so(file, tmp_path):
    path = tmp_path / "other.pte"
    path.write_bytes(b"no program at all")
    write_json(beside(path), read_json(beside(file), "") | {"program_sha256": file_digest(path)})
    with pytest.raises(UserError, match=r"other\.pte: found a program that ExecuTorch cannot run \(.*\); accepted: "):
        ExecuTorch().read(path)


def test_a_missing_package_is_named_with_the_extra(file, uninstall, tmp_path):
    uninstall("executorch")
    for use in (
        lambda: ExecuTorch().check(None),
        lambda: ExecuTorch().write(tmp_path / "model.pte", TokenMixer(), describe("own")),
        lambda: ExecuTorch().read(file),
    ):
        with pytest.raises(UserError, match=r"^executorch is not installed; pip install 'compress\[executorch\]'$"):
            use()
    assert not list(tmp_path.iterdir())
