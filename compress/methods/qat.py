"""Quantization-aware training: the student learns on the grids that it will be stored on.

What is minimised is whatever loss is chosen, with a teacher if that compares with one; see
`compress.quantization.lsq` for the grids.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.arguments import Supplied
from compress.errors import UserError
from compress.methods.cached_teacher import Views
from compress.methods.classifier import Classifier, Shape
from compress.methods.kd import KD
from compress.methods.mixup import Blend
from compress.methods.supervised import Supervised
from compress.quantization.coded_steps import SETTLED, Rate, RateTraining
from compress.quantization.lsq import FakeQuantization, Width, rate, steps
from compress.quantization.preparation import check_layers


class QAT(Classifier):
    """`method=qat`: `model` is the student with fake-quantized weights and inputs of its layers.

    `weight_bits`, `activation_bits`, `first_last_bits`, `skip` and `weight_rate` are those of `FakeQuantization`;
    `student` itself stays as it is. With a `weight_rate` the loss has one more term, `rate`. From epoch
    `freeze_bn_epoch` on (the first is 0) BatchNorm keeps its running statistics and normalises with them, as the folded
    network does.
    """

    loss_compares_with = frozenset({None, "teacher"})

    def __init__(
        self,
        student: Supplied[nn.Module],
        weight_bits: Width | None = 4,
        activation_bits: Width | None = None,
        first_last_bits: Width | None = 8,
        skip: Sequence[str] = (),
        weight_rate: Rate | None = None,
        freeze_bn_epoch: Annotated[int, Field(ge=0)] | None = None,
        teacher_cache: Views = "auto",
        *,
        input_shape: Supplied[tuple[int, int, int]],
        **supplied: Any,
    ) -> None:
        grids = FakeQuantization(weight_bits, activation_bits, first_last_bits, tuple(skip), weight_rate)
        super().__init__(student=grids.prepare(student, input_shape), input_shape=input_shape, **supplied)
        self.freeze_bn_epoch = freeze_bn_epoch
        self.rate_training = None if weight_rate is None else RateTraining(weight_rate)

    @property
    def hinders_record(self) -> str | None:
        return None if self.rate_training is None else "the price of a bit follows from step to step"

    @classmethod
    def grids(cls, options: Mapping[str, Any]) -> FakeQuantization:
        names = ("weight_bits", "activation_bits", "first_last_bits", "weight_rate")
        return FakeQuantization(**{name: options[name] for name in names}, skip=tuple(options["skip"]))

    @classmethod
    def first_best_epoch(cls, options: Mapping[str, Any], epochs: int) -> int:
        return 0 if options["weight_rate"] is None else math.ceil(SETTLED * epochs) - 1

    @classmethod
    def check_networks(
        cls, options: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None, input_shape: Shape
    ) -> None:
        if options["weight_bits"] is not None and options["weight_rate"] is not None:
            raise UserError(
                f"method.weight_rate: found {options['weight_rate']} beside weight_bits={options['weight_bits']}; "
                "accepted: one of them, the other null"
            )
        if cls.grids(options).keeps_weights and options["activation_bits"] is None:
            raise UserError(
                "method.weight_bits, method.weight_rate, method.activation_bits: found null for all three; accepted: "
                "2 to 8 for weight_bits or activation_bits, or 0.1 to 6 for weight_rate"
            )
        check_layers(student, input_shape, options["skip"], "method.skip")

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.freeze_bn_epoch is not None and self.current_epoch >= self.freeze_bn_epoch:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def losses(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[Tensor, dict[str, Tensor]]:
        method = Supervised if self.teacher is None else KD
        logits, terms = method.losses(self, images, target, blend)  # type: ignore[arg-type]  # they read what all have
        if self.rate_training is not None:
            self._bits = rate(self.model)
            terms = {**terms, "rate": self.rate_training.price * self._bits.interpolated}
        return logits, terms

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.rate_training is not None:
            self.rate_training.before_step(self._bits)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        if self.rate_training is not None:
            steps = self.trainer.estimated_stepping_batches * self.trainer.accumulate_grad_batches
            self.rate_training.after_step(self._bits, int(steps))
            self.train_terms.setdefault("bits_per_weight", []).append(self._bits.exact)

    def parameters_to_learn(self, network: nn.Module) -> Iterable[Any]:
        """The step sizes form a group without weight decay, which would pull them to zero."""
        step_sizes = steps(network)
        identities = {id(step) for step in step_sizes}
        others = [parameter for parameter in network.parameters() if id(parameter) not in identities]
        return [{"params": others}, {"params": step_sizes, "weight_decay": 0.0}]
