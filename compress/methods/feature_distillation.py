"""What methods share that compare features of the student with those of a frozen teacher."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from compress.errors import UserError
from compress.methods.classifier import Classifier, Shape
from compress.methods.features import check_layers_of, feature_layers, shapes, tapped
from compress.methods.frozen_teacher import FrozenTeacher
from compress.methods.learning_teacher import LearningTeacher
from compress.methods.mixup import Blend

Pairs = list[tuple[str, str]]


class FeatureDistillation(Classifier):
    """The chosen loss on the logits, and a feature loss on pairs of modules, one of the student and one of the teacher.

    `layers` names the student's modules, `teacher_layers` the teacher's; without the second they have the same names.
    Without either, they are the last part of both networks at each size of the feature maps (`feature_layers`); where
    one network has more of these, its first ones are dropped.
    """

    needs = frozenset({"teacher", "features"})
    loss_compares_with = frozenset({None, "teacher"})
    teacher: FrozenTeacher | LearningTeacher
    input_shape: Shape
    # Compares the inputs of the modules instead of their outputs.
    inputs = False

    def __init__(
        self, layers: Sequence[str] | None = None, teacher_layers: Sequence[str] | None = None, **supplied: Any
    ) -> None:
        super().__init__(**supplied)
        options = {"layers": layers, "teacher_layers": teacher_layers}
        self.pairs = self.choose(options, self.model, self.teacher.network, self.input_shape)

    @classmethod
    def check_networks(
        cls, options: Mapping[str, Any], student: nn.Module, teacher: nn.Module | None, input_shape: Shape
    ) -> None:
        assert teacher is not None  # as `needs` says
        cls.choose(options, student, teacher, input_shape)

    @classmethod
    def choose(cls, options: Mapping[str, Any], student: nn.Module, teacher: nn.Module, input_shape: Shape) -> Pairs:
        """The pairs of modules; raises UserError, naming the key, for names that do not exist or do not fit."""
        layers, teacher_layers = options["layers"], options["teacher_layers"]
        if layers is None and teacher_layers is not None:
            raise UserError("method.teacher_layers: found it without method.layers; accepted: both, or neither")
        if layers is None:
            layers, teacher_layers = zip(*cls.default_pairs(student, teacher, input_shape), strict=True)
        check_layers_of(student, layers, "method.layers")
        where = "method.layers (of the teacher)" if teacher_layers is None else "method.teacher_layers"
        teacher_layers = layers if teacher_layers is None else teacher_layers
        check_layers_of(teacher, teacher_layers, where)
        if not layers or len(layers) != len(teacher_layers):
            raise UserError(
                f"method.teacher_layers: found {len(teacher_layers)} names for {len(layers)} of the student; "
                "accepted: one for each, at least 1"
            )
        for key, network, names in (("layers", student, layers), ("teacher_layers", teacher, teacher_layers)):
            for name, shape in zip(names, shapes(network, names, input_shape, cls.inputs), strict=True):
                cls.check_shape(f"method.{key}", name, shape)
        return list(zip(layers, teacher_layers, strict=True))

    @classmethod
    def default_pairs(cls, student: nn.Module, teacher: nn.Module, input_shape: Shape) -> Pairs:
        """The pairs that are compared where no layers are named."""
        layers, teacher_layers = feature_layers(student, input_shape), feature_layers(teacher, input_shape)
        count = min(len(layers), len(teacher_layers))
        if count == 0:
            raise UserError("method.layers: found no feature maps in one of the networks; accepted: names of modules")
        return list(zip(layers[-count:], teacher_layers[-count:], strict=True))

    @classmethod
    def check_shape(cls, key: str, name: str, shape: tuple[int, ...] | None) -> None:
        """Raises UserError, naming `key`, where features of this `shape` of the module `name` cannot be compared."""
        if shape is None or len(shape) != 4:
            raise UserError(f"{key}: found {name!r}, which puts out no feature maps; accepted: a convolutional part")

    def losses(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[Tensor, dict[str, Tensor]]:
        seen = blend(images) if blend else images
        names, teacher_names = zip(*self.pairs, strict=True)
        with tapped(self.teacher.network, teacher_names, self.inputs) as of_teacher:
            teacher_logits = self.teacher(seen)
        with tapped(self.model, names, self.inputs) as of_student:
            logits = self.model(seen)
        features = [of_student[name] for name in names], [of_teacher[name] for name in teacher_names]
        return logits, self.loss_terms(logits, target, teacher_logits, blend) | self.feature_terms(*features)

    @abstractmethod
    def feature_terms(self, student: list[Tensor], teacher: list[Tensor]) -> dict[str, Tensor]:
        """The weighted feature losses by name, from the features of each pair."""
