"""What methods share that compare features of the student with those of a frozen teacher."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from compress.errors import UserError
from compress.methods.classifier import Classifier
from compress.methods.features import check_layers_of, feature_layers, shapes, tapped
from compress.methods.frozen_teacher import FrozenTeacher
from compress.methods.mixup import Blend

Pairs = list[tuple[str, str]]


class FeatureDistillation(Classifier):
    """The chosen loss on the logits, and a feature loss on pairs of modules, one of the student and one of the teacher.

    `layers` names the student's modules, `teacher_layers` the teacher's; without the second they have the same names.
    Without either, they are the last part of both networks at each size of the feature maps (`feature_layers`); where
    one network has more of these, its first ones are left out. `input_shape` `(C, H, W)` is that of an image.
    """

    loss_compares_with = frozenset({None, "teacher"})
    # Whether what goes into the modules is compared, rather than what comes out.
    inputs = False

    def __init__(
        self,
        teacher: FrozenTeacher,
        input_shape: tuple[int, int, int],
        layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
        **classifier: Any,
    ) -> None:
        super().__init__(**classifier)
        self.teacher = teacher
        options = {"layers": layers, "teacher_layers": teacher_layers}
        self.pairs = self.choose(options, self.model, teacher.network, input_shape)

    @classmethod
    def check_networks(
        cls,
        options: Mapping[str, Any],
        student: nn.Module,
        teacher: nn.Module | None,
        input_shape: tuple[int, int, int],
    ) -> None:
        cls.choose(options, student, teacher, input_shape)

    @classmethod
    def choose(
        cls, options: Mapping[str, Any], student: nn.Module, teacher: nn.Module, input_shape: tuple[int, int, int]
    ) -> Pairs:
        """The pairs of modules; raises UserError, naming the key, for names that do not exist or do not fit."""
        own, others = options["layers"], options["teacher_layers"]
        if own is None and others is not None:
            raise UserError("method.teacher_layers: found it without method.layers; accepted: both, or neither")
        if own is None:
            pairs = cls.default_pairs(student, teacher, input_shape)
            own, others = [one for one, _ in pairs], [other for _, other in pairs]
        check_layers_of(student, own, "method.layers")
        same = others is None
        others = own if same else others
        check_layers_of(teacher, others, "method.teacher_layers" if not same else "method.layers (of the teacher)")
        if not own or len(own) != len(others):
            raise UserError(
                f"method.teacher_layers: found {len(others)} names for {len(own)} of the student; "
                "accepted: one for each, at least 1"
            )
        for key, network, names in (("layers", student, own), ("teacher_layers", teacher, others)):
            for name, shape in zip(names, shapes(network, names, input_shape, cls.inputs), strict=True):
                cls.check_shape(f"method.{key}", name, shape)
        return list(zip(own, others, strict=True))

    @classmethod
    def default_pairs(cls, student: nn.Module, teacher: nn.Module, input_shape: tuple[int, int, int]) -> Pairs:
        own, others = feature_layers(student, input_shape), feature_layers(teacher, input_shape)
        count = min(len(own), len(others))
        if count == 0:
            raise UserError("method.layers: found no feature maps in one of the networks; accepted: names of modules")
        return list(zip(own[-count:], others[-count:], strict=True))

    @classmethod
    def check_shape(cls, key: str, name: str, shape: tuple[int, ...] | None) -> None:
        if shape is None or len(shape) != 4:
            raise UserError(f"{key}: found {name!r}, which puts out no feature maps; accepted: a convolutional part")

    def on_fit_start(self) -> None:
        self.teacher.to(self.device)

    def losses(self, images: Tensor, target: Tensor, blend: Blend | None) -> tuple[Tensor, dict[str, Tensor]]:
        seen = blend(images) if blend else images
        names, teacher_names = zip(*self.pairs, strict=True)
        with tapped(self.teacher.network, teacher_names, self.inputs) as taken:
            teacher_logits = self.teacher(seen)
        teacher_features = [taken[name] for name in teacher_names]
        with tapped(self.model, names, self.inputs) as taken:
            logits = self.model(seen)
        features = [taken[name] for name in names]
        terms = self.compared(logits, target, teacher_logits, blend)
        return logits, terms | self.feature_terms(features, teacher_features)

    @abstractmethod
    def feature_terms(self, student: list[Tensor], teacher: list[Tensor]) -> dict[str, Tensor]:
        """The weighted feature losses by name, from the features of each pair."""
