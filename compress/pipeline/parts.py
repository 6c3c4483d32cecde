"""The parts of a run, built from its configuration: data, networks, method, quantizer, exporters."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from compress import models
from compress.arguments import arguments_of, build, defaults, plain
from compress.checksums import digest
from compress.config import ensemble
from compress.config.class_map import mapped
from compress.config.pretrained import class_names
from compress.config.ranges import STUDENT
from compress.config.rules import method_of, uses_peers, uses_teacher
from compress.data.module import DataModule
from compress.data.shared import DataSets
from compress.errors import UserError
from compress.export.description import NetworkDescription, describe
from compress.export.exporter import Exporter
from compress.export.weights import load_weights
from compress.methods.classifier import Classifier
from compress.models import own_class
from compress.models.pretrained import published
from compress.optim.groups import OptimizerFactory, optimizer_factory
from compress.pruning.recipe import MaskRecipe, Recipe
from compress.quantization import Quantizer
from compress.quantization.lsq import FakeQuantization
from compress.results.surroundings import versions_in_files
from compress.training.fit import device


def digest_of(config: DictConfig) -> str:
    """The SHA-256 of `config` as it stands in `config.yaml`."""
    return digest(OmegaConf.to_yaml(config, resolve=True))


def _role(name: str) -> str:
    """What the configuration calls the network that learns under `name` in the method."""
    return "student" if name == "model" else "peer"


class Parts:
    """Everything that `config`, whose values were checked, describes; each part is built on first use and once.

    `data_sets` has the images that other runs of this process have read. Networks get fresh weights from the global
    generator, in the order in which they are first used: seed it before, where the weights matter. `start` takes the
    place of the student that `student` in the configuration describes. Of `networks`, which are given from Python,
    copies take the place of what the configuration calls `student` or `teacher`.
    """

    def __init__(
        self,
        config: DictConfig,
        data_sets: DataSets | None = None,
        start: nn.Module | None = None,
        networks: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.config = config
        self.plain = plain(config)
        self.data_sets = data_sets or DataSets()
        self._start = start
        self.networks = networks or {}

    def node(self, key: str) -> dict[str, Any]:
        """The part of the configuration at `key`, such as `teacher.members[0]`."""
        return plain(OmegaConf.select(self.config, key))

    @cached_property
    def device(self) -> torch.device:
        return device(self.plain["trainer"]["accelerator"])

    @cached_property
    def data(self) -> DataModule:
        return self.data_with(seed=self.plain["seed"])

    def data_with(self, seed: int, batch_size: int | None = None) -> DataModule:
        """The same images in an order and augmentation that follow from `seed`."""
        return self.data_sets.module(self.plain["data"], seed=seed, device=self.device, batch_size=batch_size)

    @cached_property
    def method(self) -> type[Classifier]:
        return method_of(self.config)

    @property
    def method_options(self) -> dict[str, Any]:
        """The arguments of the method that the configuration gives, and the defaults of those that it leaves out."""
        return defaults(self.method) | arguments_of(self.plain["method"])

    @cached_property
    def loss(self) -> Any:
        return build(self.plain["loss"], "loss")

    @cached_property
    def mixup(self) -> Any | None:
        return build(self.plain["mixup"], "mixup") if self.plain["mixup"] else None

    def build_small(self) -> None:
        """Builds what has neither data nor networks, so that a constructor of the user's fails now if it does."""
        _ = self.loss, self.mixup, self.optimizer, self.scheduler, self.recipe, self.quantizer, self.exporters

    @cached_property
    def optimizer(self) -> OptimizerFactory:
        return optimizer_factory(self.plain["optimizer"])

    @cached_property
    def scheduler(self) -> Any:
        return build(self.plain["scheduler"], "scheduler")

    @cached_property
    def recipe(self) -> Recipe | None:
        return build(self.plain["pruning"], "pruning") if self.plain["pruning"] else None

    @property
    def mask_recipe(self) -> MaskRecipe | None:
        return self.recipe if isinstance(self.recipe, MaskRecipe) else None

    @property
    def first_best_epoch(self) -> int:
        """The first epoch, counted from 0, that can be the best: the one at whose end the network is as small as asked.

        That is when pruning is complete, and when a method that makes it smaller has done so.
        """
        epochs = self.plain["trainer"]["max_epochs"]
        last = 0 if self.mask_recipe is None else self.mask_recipe.window(epochs)[1]
        return max(last - 1, self.method.first_best_epoch(self.method_options, epochs))

    @cached_property
    def quantizer(self) -> Quantizer | None:
        return build(self.plain["quantizer"], "quantizer") if self.plain["quantizer"] else None

    @cached_property
    def exporters(self) -> list[Exporter]:
        return [build(node, f"export.{name}", Exporter) for name, node in self.plain["export"].items()]

    @property
    def fake_quantization(self) -> FakeQuantization | None:
        """The grids that the method trains on, if it does."""
        return self.method.grids(self.method_options)

    @cached_property
    def fresh_student(self) -> nn.Module:
        """The student before any pruning, with the weights of its checkpoint if it has one."""
        if self._start is not None:
            return self._start
        node = self.plain["student"]
        return self.network("student", node["checkpoint"], new_head=node.get("head") == "new")

    def network(self, role: str, checkpoint: str | Path | None = None, new_head: bool = False) -> nn.Module:
        """A fresh network of `student`, `peer` or one of `teacher_keys`, with the weights in `checkpoint` if any.

        With `new_head` those of its classifier stay fresh.
        """
        classes = self.data.num_classes
        if self.is_given(role):
            network = own_class.adapted(own_class.given(self.networks[role]), classes)
        else:
            options = {key: value for key, value in self.network_node(role).items() if key not in STUDENT}
            network = models.build(num_classes=classes, **options)
        if checkpoint is not None:
            load_weights(network, checkpoint, f"{role}.checkpoint", new_head, way_out=f"{role}.head=new")
        return network

    def is_given(self, role: str) -> bool:
        """Whether the network of a `role` comes from Python."""
        return role in self.networks and bool(self.network_node(role).get("from_python"))

    def network_node(self, role: str) -> dict[str, Any]:
        """What the configuration says of the architecture of `student`, `peer` or one of `teacher_keys`."""
        node: dict[str, Any] = self.plain["student"]
        if role == "peer":
            node = self.plain["peer"] or node
        elif role != "student":
            node = self.node(role)["model"]
        return node

    def label(self, role: str) -> str:
        """What the network of `student`, `peer` or one of `teacher_keys` is called."""
        return models.label(self.network_node(role))

    @cached_property
    def student(self) -> nn.Module:
        """The student that is trained, without the channels that structured pruning takes away."""
        return self._shrunk(self.fresh_student)

    @property
    def pruned_student(self) -> nn.Module:
        """The student as pruning will leave it, but for the values of its weights."""
        student = self.fresh_student
        return student if self.recipe is None else self.recipe.pruned(student, self.data.input_shape)

    def description(self, student: nn.Module) -> NetworkDescription:
        """What a model file says of `student`, with whatever channels it has, and of the data."""
        return describe(self.described("student", student), self.data, self.origin)

    @cached_property
    def configuration(self) -> str:
        """The SHA-256 of the configuration, as it stands in `config.yaml`."""
        return digest_of(self.config)

    @property
    def origin(self) -> dict[str, Any]:
        """What a model file says of where it comes from, as the record of the run does."""
        return {"configuration": self.configuration, "seed": self.plain["seed"], "versions": versions_in_files()}

    def described(self, role: str, network: nn.Module) -> dict[str, Any]:
        """What a model file says of a `network` of `student` or `peer`, see `compress.models.architecture`."""
        fresh = self.network(role) if self.is_given(role) else None
        return models.architecture(self.network_node(role), self.data.num_classes, network, fresh)

    @cached_property
    def peers(self) -> list[nn.Module]:
        """The other networks of a method with peers."""
        if not uses_peers(self.config):
            return []
        networks = [self.network("peer") for _ in range(self.method.number_of_peers(self.method_options) - 1)]
        return [self._shrunk(network) for network in networks]

    def _shrunk(self, network: nn.Module) -> nn.Module:
        return network if self.recipe is None else self.recipe.shrink(network, self.data.input_shape)

    @property
    def published_weights(self) -> dict[str, Any]:
        """What the record says of the published weights that the student started from; nothing where it did not."""
        student = self.plain["student"]
        weights = student.get("pretrained")
        if not weights:
            return {}
        try:
            licence = published(student, weights, "student.pretrained").licence
        except UserError:  # their description was there when they were loaded
            licence = None
        about = {"weights": f"{models.label(student)} {weights}"}
        return about if licence is None else about | {"licence": licence}

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """What a model file says of the student, see `compress.models.architecture`."""
        return self.described("student", self.student)

    @cached_property
    def architectures(self) -> dict[str, dict[str, Any]]:
        """Those of all networks that learn, by their names in the method."""
        peers = {f"others.{index}": self.described("peer", peer) for index, peer in enumerate(self.peers)}
        return {"model": self.architecture, **peers}

    def rebuilt(self, name: str) -> nn.Module:
        """A network like the one that learns under `name` in the method, with weights of no meaning."""
        return models.with_channels(self._template(name), self.architectures[name].get("channels", {}))

    def own_network(self, name: str) -> nn.Module | None:
        """What reading a file of that network takes: one of its class, if that is one of the user's own."""
        return self._template(name) if models.names_class(self.network_node(_role(name))["stem"]) else None

    def _template(self, name: str) -> nn.Module:
        return self.network(_role(name))

    @property
    def updates_teacher(self) -> bool:
        """Whether the teacher learns on while it teaches."""
        return self.method.updates_teacher(self.method_options)

    @property
    def teacher_keys(self) -> list[str]:
        """Where the configuration has the networks of the teacher; none for a method that uses no teacher."""
        return ensemble.keys(self.config) if uses_teacher(self.config) else []

    def teacher_network(self, key: str = "teacher") -> nn.Module:
        """A fresh network of the teacher at `key`, one of `teacher_keys`."""
        return self.network(key)

    def trains_teacher(self, key: str) -> bool:
        """Whether the teacher at `key` has to be trained or found: it has no checkpoint, and is not given."""
        return self.node(key)["checkpoint"] is None and not self.is_given(key)

    def load_teacher(self, network: nn.Module, key: str) -> None:
        """Loads the checkpoint of the teacher at `key` into its `network`: the classes that the data have."""
        node, where = self.node(key), f"{key}.classes"
        classes = node.get("classes")
        if isinstance(classes, str):
            classes = mapped(classes, self.data.class_names, where)
        names = class_names(node, node["model"], key)
        load_weights(network, node["checkpoint"], f"{key}.checkpoint", False, where, classes, names)

    def float_start(self, float_checkpoint: Path | None) -> nn.Module | None:
        """The float network that training starts from; None where there is none or it has lost channels since.

        `float_checkpoint` is one that counts instead of that of the student.
        """
        node = self.plain["student"]
        checkpoint = float_checkpoint or node["checkpoint"]
        if checkpoint is None or (float_checkpoint is None and node.get("head") == "new"):  # which knows no class yet
            return None
        with torch.random.fork_rng(devices=[]):
            start = self.network("student", checkpoint)
        return start if self.described("student", start) == self.architecture else None

    def learner(self, teacher: Any | None) -> Classifier:
        """The LightningModule that is trained; `teacher` is what the method calls, if it uses one."""
        return self.method(
            **self.method_options,
            student=self.student,
            others=self.peers,
            teacher=teacher,
            loss=self.loss,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            mixup=self.mixup,
            num_classes=self.data.num_classes,
            input_shape=self.data.input_shape,
            seed=self.plain["seed"],
        )
