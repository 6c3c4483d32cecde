"""Everything that a run does later, done once on two images and the run's own device, before any training.

A training step with its loss and gradients, a checkpoint written and read, folding, quantization, tuning, and each
exporter.
"""

import copy
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError, first_line
from compress.export.formats import read_back, with_reference
from compress.methods.classifier import Classifier
from compress.methods.frozen_teacher import FrozenEnsemble, FrozenTeacher
from compress.methods.learning_teacher import LearningTeacher
from compress.models.inference import full_float32
from compress.models.masks import weight_of
from compress.models.outputs import logits
from compress.pipeline.parts import Parts
from compress.quantization import Correction, GridOptions, QuantizedModel, Quantizer, Refinement
from compress.quantization.comparisons import compare
from compress.quantization.preparation import prepare
from compress.quantization.solvers import RTN
from compress.quantization.tuning import Tuner
from compress.training.compiling import compile_networks

# Options under which quantizing costs next to nothing.
CHEAP: dict[str, Any] = {
    "solver": RTN(),
    "refinement": Refinement(),
    "correction": Correction(bias=False),
    "grid": GridOptions(scale="max_abs"),
    "rates": [],
    "budget": None,
    "max_drop": None,
    "latency": None,
}


def rehearse(parts: Parts, student: nn.Module) -> None:
    """Raises UserError for the first thing that would fail later in the run of `parts`, which are used up by it.

    `student` is what pruning will leave of the student, but for the values of its weights.
    """
    device = parts.data.device
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), torch.enable_grad(), full_float32():
        images = torch.cat(parts.data.calibration_batches(2))
        student.to(device)
        with _said(parts, "teacher", "a network that fails for images of noise"):
            teacher = _teacher(parts)
        method = parts.plain["method"]["stem"]
        with _said(parts, "method", f"{method}, whose networks fail for images of noise"):
            learner = parts.learner(teacher).to(device)
        if learner.teacher is not None:
            learner.teacher.to(device)
        _train(parts, learner, images)
        variants: list[nn.Module | QuantizedModel] = [] if parts.quantizer else [student]
        if parts.fake_quantization is not None:
            variants.append(parts.fake_quantization.bake(learner.model, parts.data.input_shape))
        if parts.quantizer is not None:
            variants += _quantize(parts, parts.quantizer, student, images)
        _export(parts, variants, student, images)
    student.cpu()


def _teacher(parts: Parts) -> FrozenTeacher | FrozenEnsemble | LearningTeacher | None:
    """A teacher with fresh weights, if the method uses one."""
    networks = [parts.teacher_network(key) for key in parts.teacher_keys]
    if not networks:
        return None
    if parts.updates_teacher:
        return LearningTeacher(networks[0])
    frozen = [FrozenTeacher(network, parts.data.input_shape) for network in networks]
    return frozen[0] if len(frozen) == 1 else FrozenEnsemble(frozen)


def _train(parts: Parts, learner: Classifier, images: Tensor) -> None:
    """One step without the optimizer, and a checkpoint."""
    target = torch.arange(len(images), device=images.device) % parts.data.num_classes
    with _said(parts, "method", f"{parts.plain['method']['stem']}, whose step fails for two images"):
        learner.train()
        _, terms = learner.losses(images, target, None)
        sum(terms.values(), images.new_zeros(())).backward()
    if parts.plain["trainer"].get("compile"):
        _compile(learner.model, images)
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    with _said(parts, "student", "a state that cannot be read back from a checkpoint"):
        learner.load_state_dict(torch.load(file, weights_only=True))


def _compile(network: nn.Module, images: Tensor) -> None:
    """A step of a compiled copy, for which a compiler works minutes, and whose result is kept for the training."""
    compiled = copy.deepcopy(network)
    compile_networks([compiled])
    try:
        logits(compiled(images)).square().mean().backward()
    except Exception as failure:  # of the compiler, of what it calls, or of the network
        raise UserError(
            f"trainer.compile: found true, but PyTorch cannot compile the student ({type(failure).__name__}: "
            f"{first_line(failure)}); accepted: false"
        ) from failure


def _quantize(parts: Parts, quantizer: Quantizer, student: nn.Module, images: Tensor) -> list[QuantizedModel]:
    """The student on the coarsest and cheapest codes, and one layer as the quantizer will answer it."""
    compare(student, [images], quantizer.skip)
    prepared = prepare(student, [images], quantizer.skip)
    smallest = min(prepared.order, key=lambda name: weight_of(prepared.analog.get_submodule(name)).numel())
    others = [name for name in prepared.order if name != smallest]
    alone = replace(quantizer, skip=[*quantizer.skip, *others])
    with _said(parts, "quantizer", f"{quantizer.name}, which fails for {smallest}"):
        if quantizer.widths:
            alone(student, [images], min(quantizer.widths))
        if quantizer.coded_rates or quantizer.searches:
            alone.at_rates(student, [images])(1.0)
    coarsest = min(quantizer.widths, default=8)
    coarse = replace(quantizer, **CHEAP, bits=[coarsest])(student, [images], coarsest)
    if quantizer.tune is not None:
        Tuner(replace(quantizer.tune, epochs=1), prepared, [images])(coarse)
    return [coarse]


def _export(parts: Parts, variants: list[nn.Module | QuantizedModel], student: nn.Module, images: Tensor) -> None:
    description, own_network = parts.description(student), parts.own_network("model")
    with tempfile.TemporaryDirectory() as folder:
        for exporter in with_reference(parts.exporters):
            for network in variants:
                path = Path(folder) / f"student{exporter.suffix}"
                with _said(parts, "export", f"{type(exporter).__name__}, which fails for the student"):
                    try:
                        exporter.write(path, network, description, [images])
                        model, _ = read_back(exporter, path, own_network=own_network)
                    except UserError as mistake:
                        # Nobody finds the file of a rehearsal.
                        said = str(mistake).replace(str(path), f"the student's {exporter.suffix} file")
                        raise UserError(f"export: {said}") from mistake
                    model(images.cpu())


@contextmanager
def _said(parts: Parts, key: str, what: str) -> Iterator[None]:
    """What a part of the user's raises within it is a mistake of the user; what one of ours raises is one of ours."""
    try:
        yield
    except UserError:
        raise
    except Exception as failure:
        if not _has_foreign_parts(parts):
            raise
        raise UserError(
            f"{key}: found {what} ({type(failure).__name__}: {first_line(failure)}); "
            "accepted: parts that fit each other"
        ) from failure


def _has_foreign_parts(parts: Parts) -> bool:
    networks = [parts.fresh_student, *parts.peers, *map(parts.teacher_network, parts.teacher_keys)]
    solver = [] if parts.quantizer is None else [parts.quantizer.solver]
    kinds = [parts.method, *map(type, (parts.loss, *networks, *parts.exporters, *solver))]
    return any(not kind.__module__.startswith("compress.") for kind in kinds)
