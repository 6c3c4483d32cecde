"""What all methods share: a network is trained, validated and checkpointed as `model`, its peers beside it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy

from compress.arguments import Supplied
from compress.collective import mean_of_processes
from compress.export.state_dicts import BEST_NETWORK
from compress.losses.precision import at_least_float32
from compress.methods.cached_teacher import CachedTeacher
from compress.methods.frozen_teacher import FrozenEnsemble, FrozenTeacher
from compress.methods.learning_teacher import LearningTeacher
from compress.methods.mixup import Blend, CutMix, Mixup
from compress.methods.step_graph import StepGraph
from compress.models.memory_format import lay_out
from compress.optim.schedules import Schedule
from compress.quantization.lsq import FakeQuantization

OptimizerFactory = Callable[..., Optimizer]
Loss = Callable[..., dict[str, Tensor]]
Shape = tuple[int, int, int]  # (C, H, W) of an image
Teacher = FrozenTeacher | FrozenEnsemble | CachedTeacher | LearningTeacher


class Classifier(pl.LightningModule, ABC):
    """A LightningModule around classifiers `(B, 3, H, W) -> (B, C)`: `model`, and its peers in `others`.

    A method implements `losses`, which returns what is minimised. Loss terms are buffered on the device and logged
    once an epoch, each as `train/<name>`, because a call of `self.log` in every step costs more than a small network's
    step. `val/accuracy` is that of the best network; a checkpoint names it under `best_network`.

    The run supplies the arguments of this constructor to every method; `input_shape` is `(C, H, W)`. The arguments
    that a method adds are its keys in YAML.
    """

    # What the method cannot do without: "teacher", "peers", "features" (the feature maps of a single teacher network).
    needs: ClassVar[frozenset[str]] = frozenset()
    # What a loss may compare with to fit the method: None (the labels alone), "teacher", "peers".
    loss_compares_with: ClassVar[frozenset[str | None]] = frozenset({None})

    def __init__(
        self,
        *,
        student: Supplied[nn.Module],
        loss: Supplied[Loss],
        optimizer: Supplied[OptimizerFactory],
        scheduler: Supplied[Schedule],
        num_classes: Supplied[int],
        input_shape: Supplied[Shape | None] = None,
        seed: Supplied[int] = 0,
        mixup: Supplied[Mixup | CutMix | None] = None,
        teacher: Supplied[Teacher | None] = None,
        others: Supplied[Sequence[nn.Module]] = (),
    ) -> None:
        super().__init__()
        self.model = student
        self.others = nn.ModuleList(others)
        self.loss = loss
        self.optimizer_factory = optimizer
        self.schedule = scheduler
        self.num_classes = num_classes
        self.input_shape = input_shape
        self.seed = seed
        self.mixup = mixup
        self.networks = {"model": self.model} | {f"others.{index}": other for index, other in enumerate(self.others)}
        self.best_network = "model"
        accuracies = (MulticlassAccuracy(num_classes, average="micro") for _ in self.networks)
        # A ModuleList does not say of what.
        self.validation_accuracy: Sequence[MulticlassAccuracy] = nn.ModuleList(accuracies)  # type: ignore[assignment]
        self.validation_loss: list[list[Tensor]] = [[] for _ in self.networks]
        self.train_terms: dict[str, list[Tensor]] = {}
        self.teacher = teacher
        # Of the images of the batch, int64 (B,), where batches have them.
        self.index: Tensor | None = None
        # What takes the steps that it can replay, see there.
        self.step_graph: StepGraph | None = None
        for network in self.learning_networks:
            lay_out(network, input_shape)

    @property
    def learning_networks(self) -> list[nn.Module]:
        """The student, its peers, and a teacher that learns on."""
        return [*self.networks.values(), *([self.teacher.network] if isinstance(self.teacher, LearningTeacher) else [])]

    @property
    def hinders_record(self) -> str | None:
        """Why a step of this method cannot stand for all of an epoch, see `StepGraph`; None where it can."""
        return None

    @classmethod
    def number_of_peers(cls, options: Mapping[str, Any]) -> int:
        """How many networks a method with these `options` trains, the student among them."""
        return 1

    @classmethod
    def updates_teacher(cls, options: Mapping[str, Any]) -> bool:
        """Whether a method with these `options` trains the teacher further."""
        return False

    @classmethod
    def grids(cls, options: Mapping[str, Any]) -> FakeQuantization | None:
        """The quantization grids that a method with these `options` trains `model` on."""

    @classmethod
    def first_best_epoch(cls, options: Mapping[str, Any], epochs: int) -> int:
        """The first of so many `epochs`, counted from 0, whose network is as small as the `options` ask for."""
        return 0

    @classmethod
    def check_networks(
        cls, options: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None, input_shape: Shape
    ) -> None:
        """Raises UserError where the method's `options` do not fit the float networks, whose weights may be changed.

        `teacher` is None for a method without one and for an ensemble; `input_shape` is `(C, H, W)`.
        """

    @abstractmethod
    def losses(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits `(B, C)` and the weighted loss terms by name, whose sum is minimised.

        `blend`, if there is one, is to be applied to the images and handed to `loss_terms`.
        """

    def teacher_logits(self, images: Tensor, seen: Tensor, blend: Blend | None) -> Tensor:
        """The teacher's logits `(B, C)` for a training batch; `seen` are its `images` with `blend` applied."""
        assert self.teacher is not None  # of a method that compares with one
        clean = blend is None or (self.mixup is not None and self.mixup.teacher_sees == "clean")
        shown = images if clean else seen
        logits = self.teacher.at(self.index, shown) if isinstance(self.teacher, CachedTeacher) else self.teacher(shown)
        return blend(logits) if blend and clean else logits

    def loss_terms(
        self, logits: Tensor, target: Tensor, reference: Any = None, blend: Blend | None = None
    ) -> dict[str, Tensor]:
        """The loss of `logits` against `target` and what the method compares with; blended labels count by weight.

        The loss gets the logits in float32 at least, also under autocast.
        """
        logits = at_least_float32(logits)
        terms = self.loss(logits, target, reference, self.current_epoch)
        if blend is None:
            return terms
        partners = self.loss(logits, blend.of_partners(target), reference, self.current_epoch)
        return {name: torch.lerp(partners[name], value, blend.weight) for name, value in terms.items()}

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_train_epoch_start(self) -> None:
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.begin_epoch(self.current_epoch)
        if self.step_graph is not None:
            self.step_graph.begin_epoch()
        # Dropout draws from the global generator: seeding it by epoch makes a resumed run draw the same masks.
        # Processes that train together draw different masks.
        torch.manual_seed(1_000_003 * self.seed + self.current_epoch + 7_368_787 * self.global_rank)

    def training_step(self, batch: tuple[Tensor, ...], batch_index: int) -> Tensor | None:
        images, target = batch[:2]
        self.index = batch[2] if len(batch) > 2 else None
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.note(self.index)
        total = None if self.step_graph is None else self.step_graph(*batch)
        if total is None:
            values = self.values_of(images, target, self.blend(images, batch_index))
            self.note(values)
            total = values["loss"]
        return total

    def values_of(self, images: Tensor, target: Tensor, blend: Blend | None) -> dict[str, Tensor]:
        """The loss terms of a batch by name, and `loss`, which is minimised, and `accuracy`."""
        logits, terms = self.losses(images, target, blend)
        return summed(logits, target, terms)

    def blend(self, images: Tensor, batch_index: int) -> Blend | None:
        """How this batch is blended, if it is."""
        if self.mixup is None:
            return None
        place = batch_index + 1_000_003 * self.global_rank
        return self.mixup.draw(len(images), self.seed, self.current_epoch, place, images.shape[-2:])

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Keeps values of a batch for the end of the epoch."""
        for name, value in values.items():
            self.train_terms.setdefault(name, []).append(value.detach())

    def on_train_end(self) -> None:
        self.step_graph = None  # whose memory on the GPU is needed for what follows

    def on_train_epoch_end(self) -> None:
        # All batches have the same number of images.
        metrics: dict[str, Any] = {name: torch.stack(values).mean() for name, values in self.train_terms.items()}
        metrics["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        for name, value in metrics.items():
            self.log(f"train/{name}", value, logger=False, sync_dist=name in self.train_terms)
        self.train_terms = {}
        # Lightning would hand these to the loggers after the checkpoint of the epoch has been written, and a run
        # killed between the two would never log them: its resumed half begins with the next epoch.
        logged = {f"train/{name}": float(self.trainer.callback_metrics[f"train/{name}"]) for name in metrics}
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        for logger in self.loggers:
            logger.log_metrics(logged | {"epoch": self.current_epoch}, step=step)
            logger.save()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, target = batch
        for network, accuracy, losses in zip(
            self.networks.values(), self.validation_accuracy, self.validation_loss, strict=True
        ):
            logits = network(images).float()
            accuracy.update(logits, target)
            losses.append(nn.functional.cross_entropy(logits, target, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        accuracies = [accuracy.compute() for accuracy in self.validation_accuracy]
        losses = [self._mean(torch.cat(values)) for values in self.validation_loss]
        best = max(range(len(accuracies)), key=lambda index: accuracies[index])
        self.best_network = list(self.networks)[best]
        self.log("val/accuracy", accuracies[best])
        self.log("val/loss", losses[best])
        if len(accuracies) > 1:
            for number, value in enumerate(accuracies, 1):
                self.log(f"val/accuracy_of_peer_{number}", value)
        for accuracy in self.validation_accuracy:
            accuracy.reset()
        self.validation_loss = [[] for _ in self.networks]

    def _mean(self, losses: Tensor) -> Tensor:
        """The mean over the images of all processes, which may have different numbers of them."""
        if self.trainer.world_size == 1:
            return losses.mean()
        total, count = mean_of_processes(torch.stack([losses.sum(), losses.new_tensor(len(losses))]))
        mean: Tensor = total / count
        return mean

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[BEST_NETWORK] = self.best_network

    def parameters_to_learn(self, network: nn.Module) -> Iterable[Any]:
        """What the optimizer of `network` is given: parameters, or groups of them."""
        return network.parameters()

    def configure_optimizers(self) -> Any:
        return self.optimized(self.model)

    def optimized(self, network: nn.Module) -> dict[str, Any]:
        """Lightning's mapping of an optimizer of `network` and its schedule, which is stepped with it."""
        optimizer = self.optimizer_factory(self.parameters_to_learn(network))
        epochs = self.trainer.max_epochs
        assert epochs is not None  # Lightning has replaced it
        steps_per_epoch = int(self.trainer.estimated_stepping_batches) // epochs
        schedule: LRScheduler = self.schedule(optimizer, max(steps_per_epoch, 1), epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def summed(logits: Tensor, target: Tensor, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `terms`, their sum as `loss`, and the `accuracy` of the logits `(B, C)`."""
    accuracy = (logits.detach().argmax(1) == target).float().mean()
    return {**terms, "loss": torch.stack(list(terms.values())).sum(), "accuracy": accuracy}
