"""The losses of a training step and their gradients as one CUDA graph, which takes the launches off the processor."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.cuda_graph import Recorded
from compress.errors import first_line
from compress.methods.frozen_teacher import FrozenEnsemble, FrozenTeacher
from compress.progress import console

if TYPE_CHECKING:
    from compress.methods.classifier import Classifier

# Steps of a training that go by before one is recorded: layers, kernels and optimizers set themselves up in the first.
WARMING = 3
# Packages whose modules and losses do in each step of an epoch what they do in any other.
KNOWN = frozenset({"compress", "torch", "torchvision", "timm"})
# Precisions whose losses are not scaled.
PRECISIONS = frozenset({"32-true", "bf16-mixed", "bf16-true", "64-true"})


class StepGraph:
    """Steps of `module`: one is recorded in each epoch, after the first WARMING of a training, and replayed.

    As each epoch has a record of its own, what changes from epoch to epoch may do so in Python.
    """

    def __init__(self, module: "Classifier") -> None:
        self.module = module
        self.steps = 0
        self.recorded: Recorded | None = None
        self.is_of_this_epoch = self.has_failed = False
        self.parameters: list[nn.Parameter] = []
        self.addresses: list[int] = []

    def begin_epoch(self) -> None:
        self.is_of_this_epoch = False

    def __call__(self, *batch: Tensor) -> Tensor | None:
        """The loss of a batch, whose backward pass sets the gradients; None where the step is to be taken as usual."""
        self.steps += 1
        if self.has_failed or self.steps <= WARMING:
            return None
        if not self.is_of_this_epoch or self.addresses != [parameter.data_ptr() for parameter in self.parameters]:
            try:
                self._record(batch)
            except Exception as failure:  # a network can do anything that a record cannot hold
                self.has_failed, self.recorded = True, None
                console.print(f"trainer.cuda_graph: off, as a step cannot be recorded ({first_line(failure)})")
                return None
        assert self.recorded is not None
        if [tensor.shape for tensor in batch] != [tensor.shape for tensor in self.recorded.inputs]:
            return None
        for parameter in self.parameters:
            parameter.grad = None  # the record's own, which an optimizer may be about to fill with zeros
        values = self.recorded(*batch).clone()
        self.module.note(dict(zip(self.names, values.unbind(), strict=True)))
        total: Tensor = _Replayed.apply(self._leaf, values[self.names.index("loss")], self.gradients)
        return total

    def _record(self, batch: tuple[Tensor, ...]) -> None:
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None

        def work(images: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:
            self.module.index = index
            values = self.module.values_of(images, target, None)
            self.names = [*values]
            with torch.autocast(images.device.type, enabled=False):
                values["loss"].backward()
            return torch.stack([value.detach().to(values["loss"].dtype) for value in values.values()])

        try:
            self.recorded = Recorded(work, *batch, instead_of=self.recorded)
            of_all = ((parameter, parameter.grad) for parameter in self.parameters)
            self.gradients = [(parameter, gradient) for parameter, gradient in of_all if gradient is not None]
        finally:
            for parameter in self.parameters:
                parameter.grad = None
        self._leaf = torch.zeros((), device=batch[0].device, requires_grad=True)
        self.is_of_this_epoch = True


class _Replayed(torch.autograd.Function):
    """A loss whose gradients are there already, and are handed out when the backward pass asks for them."""

    @staticmethod
    def forward(context: Any, leaf: Tensor, loss: Tensor, gradients: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
        context.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(context: Any, *gradient: Tensor) -> tuple[None, None, None]:
        for parameter, value in context.gradients:
            parameter.grad = value
        return None, None, None


def hindrance(module: "Classifier", options: Mapping[str, Any]) -> str | None:
    """Why the steps of `module` cannot be replayed under the Trainer's `options`; None where they can.

    What the modules of other packages decide in Python may differ from step to step, which a record would not follow.
    """
    if module.hinders_record is not None:
        return module.hinders_record
    if module.mixup is not None:
        return "mixup draws anew for each batch"
    if options.get("accumulate_grad_batches", 1) != 1:
        return "gradients are accumulated"
    if options["precision"] not in PRECISIONS:
        return f"{options['precision']} scales the loss"
    for key in ("compile", "detect_anomaly"):
        if options.get(key):
            return f"trainer.{key} is on"
    if options.get("strategy", "auto") != "auto":
        return "several processes train together"
    for part in (module, module.loss, *_modules(module)):
        if part.__module__.partition(".")[0] not in KNOWN:
            return f"{type(part).__name__} is of a package whose steps may differ"
    return None


def _modules(module: "Classifier") -> list[nn.Module]:
    teacher = module.teacher
    frozen = getattr(teacher, "teacher", teacher)  # of one whose logits are kept
    members = frozen.members if isinstance(frozen, FrozenEnsemble) else [frozen]
    networks = [member.network for member in members if isinstance(member, FrozenTeacher)]
    return [part for network in (*module.learning_networks, *networks) for part in network.modules()]
