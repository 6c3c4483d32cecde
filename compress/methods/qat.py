"""Quantization-aware training: the student learns on the grids that it will be stored on.

What is minimised is whatever loss is chosen, with a teacher if that compares with one; see
`compress.quantization.lsq` for the grids.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from compress.arguments import Supplied
from compress.errors import UserError
from compress.methods.cached_teacher import Views
from compress.methods.classifier import Classifier, Shape
from compress.methods.kd import KD
from compress.methods.mixup import Blend
from compress.methods.supervised import Supervised
from compress.quantization.lsq import FakeQuantization, Width, steps
from compress.quantization.preparation import check_layers


class QAT(Classifier):
    """`method=qat`: `model` is the student with fake-quantized weights and inputs of its layers.

    `weight_bits`, `activation_bits`, `first_last_bits` and `skip` are those of `FakeQuantization`; `student` itself
    stays as it is. From epoch `freeze_bn_epoch` on (the first is 0) BatchNorm keeps its running statistics and
    normalises with them, as the folded network does.
    """

    loss_compares_with = frozenset({None, "teacher"})

    def __init__(
        self,
        student: Supplied[nn.Module],
        weight_bits: Width | None = 4,
        activation_bits: Width | None = None,
        first_last_bits: Width | None = 8,
        skip: Sequence[str] = (),
        freeze_bn_epoch: Annotated[int, Field(ge=0)] | None = None,
        teacher_cache: Views = "auto",
        *,
        input_shape: Supplied[tuple[int, int, int]],
        **supplied: Any,
    ) -> None:
        grids = FakeQuantization(weight_bits, activation_bits, first_last_bits, tuple(skip))
        super().__init__(student=grids.prepare(student, input_shape), input_shape=input_shape, **supplied)
        self.freeze_bn_epoch = freeze_bn_epoch

    @classmethod
    def grids(cls, options: Mapping[str, Any]) -> FakeQuantization:
        weight_bits, activation_bits = options["weight_bits"], options["activation_bits"]
        return FakeQuantization(weight_bits, activation_bits, options["first_last_bits"], tuple(options["skip"]))

    @classmethod
    def check_networks(
        cls, options: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None, input_shape: Shape
    ) -> None:
        if options["weight_bits"] is None and options["activation_bits"] is None:
            raise UserError("method.weight_bits: found null, and activation_bits too; accepted: 2 to 8 for one of them")
        check_layers(student, input_shape, options["skip"], "method.skip")

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.freeze_bn_epoch is not None and self.current_epoch >= self.freeze_bn_epoch:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def losses(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[Tensor, dict[str, Tensor]]:
        method = Supervised if self.teacher is None else KD
        return method.losses(self, images, target, blend)  # type: ignore[arg-type]  # they read what all methods have

    def parameters_to_learn(self, network: nn.Module) -> Iterable[Any]:
        """The step sizes form a group without weight decay, which would pull them to zero."""
        step_sizes = steps(network)
        identities = {id(step) for step in step_sizes}
        others = [parameter for parameter in network.parameters() if id(parameter) not in identities]
        return [{"params": others}, {"params": step_sizes, "weight_decay": 0.0}]
