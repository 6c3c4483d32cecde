"""Values of config nodes against the annotations of constructors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from omegaconf import OmegaConf
from pydantic import AfterValidator, Field
from pytorch_lightning import Trainer
from torch import nn

from compress.arguments import Supplied, annotations, arguments_of, check_arguments, imported, settable
from compress.errors import UserError


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("an even number, such as 2")
    return value


class Parent(nn.Module):
    def __init__(
        self,
        network: nn.Module,
        lr: Annotated[float, Field(gt=0)] = 0.1,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        share: Annotated[float, Field(ge=0, le=1)] | None = None,
        epochs: Annotated[int, Field(ge=1)] = 1,
        nesterov: bool = False,
        mode: Literal["min", "max"] = "min",
        bits: Literal[1, 2, 4] = 4,
        milestones: list[Annotated[int, Field(ge=1)]] = (),
        widths: Annotated[list[int], Field(min_length=2, max_length=2)] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        names: Sequence[str] = (),
        limit: int | float | None = None,
        weight_decay: float | torch.Tensor = 0.0,
        even: Annotated[int, AfterValidator(_even)] = 2,
        folder: Path | None = None,
        suffix: Annotated[str, Field(min_length=1)] = "pt",
        factors: dict[str, float] | None = None,
        loss: Callable | None = None,
        untyped=None,
        implicit: float = None,  # noqa: RUF013 - how many libraries write it
    ):
        super().__init__()


class Child(Parent):
    def __init__(self, own: Annotated[int, Field(ge=0)] = 0, lr: Annotated[float, Field(gt=1)] = 2.0, **rest):
        super().__init__(**rest)


class Closed(Parent):
    def __init__(self, own: int = 0):
        super().__init__(nn.Identity())


@dataclass(frozen=True)
class Loss:
    temperature: Annotated[float, Field(gt=0)] = 4.0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", 1, 1.0),
        ("lr", "1e-3", 0.001),
        ("momentum", 0, 0.0),
        ("share", None, None),
        ("share", "0.5", 0.5),
        ("epochs", 1e4, 10_000),
        ("epochs", "12345678901234567891", 12345678901234567891),
        ("nesterov", True, True),
        ("bits", 2, 2),
        ("milestones", [1, 2], [1, 2]),
        ("milestones", [], []),
        ("betas", [0.5, "1e-1"], (0.5, 0.1)),
        ("names", ["a"], ["a"]),
        ("limit", 1.0, 1.0),
        ("limit", 1, 1),
        ("weight_decay", 0, 0.0),
        ("even", 4, 4),
        ("folder", "a/b", Path("a/b")),
        ("factors", {"a": 1}, {"a": 1.0}),
        ("implicit", None, None),
    ],
)
def test_a_value_that_fits_is_coerced(name, value, expected):
    found = check_arguments(Parent, {name: value}, "node")[name]
    assert found == expected
    assert type(found) is type(expected) or isinstance(found, Path)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("lr", "abc", "a number greater than 0"),
        ("lr", 0, "a number greater than 0"),
        ("lr", True, "a number greater than 0"),
        ("lr", None, "a number greater than 0"),
        ("lr", float("nan"), "a number greater than 0"),
        ("lr", "nan", "a number greater than 0"),
        ("lr", [0.1], "a number greater than 0"),
        ("momentum", 1, "a number of at least 0 and less than 1"),
        ("share", 2, "a number from 0 to 1 or null"),
        ("epochs", 1.5, "a whole number of at least 1"),
        ("epochs", True, "a whole number of at least 1"),
        ("epochs", float("inf"), "a whole number of at least 1"),
        ("epochs", 0, "a whole number of at least 1"),
        ("nesterov", 1, "true or false"),
        ("nesterov", "yes", "true or false"),
        ("mode", "mean", "min, max"),
        ("mode", ["min"], "min, max"),
        ("bits", True, "1, 2, 4"),
        ("milestones", [1, 0], "a list, each element a whole number of at least 1"),
        ("milestones", 5, "a list, each element a whole number of at least 1"),
        ("widths", [1], "a list of 2 elements, each element a whole number"),
        ("betas", [0.9], "a list of 2 elements: a number, a number"),
        ("names", "abc", "a list, each element text"),
        ("limit", "all", "a whole number or a number or null"),
        ("weight_decay", "x", "a number"),
        ("even", 3, "an even number, such as 2"),
        ("even", "x", "a whole number"),
        ("suffix", "", "text of at least 1 character"),
        ("suffix", 3, "text of at least 1 character"),
        ("factors", {"a": "b"}, "a mapping, each value a number or null"),
        ("implicit", "x", "a number"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_does(name, value, accepted):
    with pytest.raises(UserError) as failure:
        check_arguments(Parent, {name: value}, "node")
    assert str(failure.value) == f"node.{name}: found {value!r}; accepted: {accepted}"


def test_an_unknown_key_lists_those_that_yaml_can_give():
    with pytest.raises(UserError) as failure:
        check_arguments(Parent, {"learning_rate": 0.1}, "node")
    message = str(failure.value)
    assert message.startswith("node.learning_rate: found an unknown key; accepted: lr, momentum, share, ")
    listed = message.split("accepted: ")[1].split(", ")
    assert not {"network", "loss", "untyped", "self"} & set(listed)


@pytest.mark.parametrize("name", ["network", "loss", "untyped"])
def test_a_parameter_for_objects_takes_nothing_from_yaml(name):
    with pytest.raises(UserError, match=f"^node.{name}: found an unknown key"):
        check_arguments(Parent, {name: None}, "node")


def test_a_child_that_passes_the_rest_on_accepts_its_parents_keys():
    assert check_arguments(Child, {"own": 1, "epochs": 3}, "node") == {"own": 1, "epochs": 3}
    with pytest.raises(UserError, match=r"^node\.lr: found 0\.5; accepted: a number greater than 1$"):
        check_arguments(Child, {"lr": 0.5}, "node")
    with pytest.raises(UserError, match=r"^node\.epochs: found an unknown key; accepted: own$"):
        check_arguments(Closed, {"epochs": 3}, "node")


def test_names_include_objects_and_what_is_passed_on_to_parents():
    assert {"own", "network", "untyped", "epochs"} <= set(annotations(Child))
    assert set(annotations(Closed)) == {"own"}


def test_a_dataclass_and_a_function_are_read_too():
    assert check_arguments(Loss, {"temperature": 2}, "loss") == {"temperature": 2.0}
    with pytest.raises(UserError, match=r"^loss\.alpha: found an unknown key; accepted: temperature$"):
        check_arguments(Loss, {"alpha": 2}, "loss")

    def scheduler(optimizer: torch.optim.Optimizer, epochs: int):
        return optimizer, epochs

    assert check_arguments(scheduler, {"epochs": 2}, "scheduler") == {"epochs": 2}
    with pytest.raises(UserError, match=r"^scheduler\.optimizer: found an unknown key; accepted: epochs$"):
        check_arguments(scheduler, {"optimizer": "sgd"}, "scheduler")


def test_a_table_of_annotations_stands_in_for_a_signature():
    table = {"lr": Annotated[float, Field(gt=0)], "nesterov": bool}
    assert check_arguments(table, {"lr": "1e-2", "nesterov": True}, "optimizer") == {"lr": 0.01, "nesterov": True}
    with pytest.raises(UserError, match=r"^optimizer\.lr: found 'abc'; accepted: a number greater than 0$"):
        check_arguments(table, {"lr": "abc"}, "optimizer")
    with pytest.raises(UserError, match=r"^optimizer\.momentum: found an unknown key; accepted: lr, nesterov$"):
        check_arguments(table, {"momentum": 0.9}, "optimizer")


def test_the_accepted_keys_can_be_given():
    values = check_arguments(Parent, {"untyped": [1], "lr": "1"}, "node", accepted=["lr", "untyped", "elsewhere"])
    assert values == {"untyped": [1], "lr": 1.0}
    with pytest.raises(UserError, match=r"^node\.epochs: found an unknown key; accepted: lr$"):
        check_arguments(Parent, {"epochs": 1}, "node", accepted=["lr"])


def test_hydras_own_keys_are_left_out_and_interpolations_resolved():
    config = OmegaConf.create({"seed": 3, "node": {"_target_": "a.b", "_partial_": True, "epochs": "${seed}"}})
    assert check_arguments(Parent, config.node, "node") == {"epochs": 3}
    found = check_arguments(Parent, {"milestones": OmegaConf.create([1, 2])}, "node")["milestones"]
    assert type(found) is list


def test_a_node_that_is_no_mapping_is_refused():
    with pytest.raises(UserError, match=r"^optimizer: found 'sgd'; accepted: a mapping of keys to values$"):
        check_arguments(Parent, "sgd", "optimizer")


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(UserError) as failure:
        check_arguments(Parent, {"lr": "x\n" * 500}, "node")
    assert len(str(failure.value)) < 160
    assert "\n" not in str(failure.value)


def test_the_signature_of_lightnings_trainer_is_understood():
    options = {"max_epochs": 3, "limit_val_batches": 1.0, "precision": "bf16-mixed", "devices": "auto", "logger": False}
    assert check_arguments(Trainer, options, "trainer") == options
    assert type(check_arguments(Trainer, options, "trainer")["limit_val_batches"]) is float
    with pytest.raises(UserError, match=r"^trainer\.precision: found 'half'; accepted: .*bf16-mixed"):
        check_arguments(Trainer, {"precision": "half"}, "trainer")


def test_what_the_run_supplies_is_no_key():
    class Method(Parent):
        def __init__(self, seed: Supplied[int], network: Supplied[torch.nn.Module], plain=1, **rest):
            super().__init__(**rest)

    assert {"seed", "network", "plain"} <= set(annotations(Method))
    assert "plain" in settable(Method)
    assert not {"seed", "network"} & set(settable(Method))
    with pytest.raises(UserError, match=r"^method\.seed: found an unknown key"):
        check_arguments(Method, {"seed": 1}, "method", accepted=settable(Method))


def test_the_arguments_of_a_node_are_its_keys_without_those_of_the_configuration():
    node = OmegaConf.create({"_target_": "fractions.Fraction", "stem": "half", "numerator": 1, "denominator": 2})
    assert arguments_of(node) == {"numerator": 1, "denominator": 2}


def test_a_partial_keeps_its_arguments(tmp_path, monkeypatch):
    (tmp_path / "narrow.py").write_text("from functools import partial\n\nNarrow = partial(dict, width=3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert imported("narrow.Narrow", "student.target")() == {"width": 3}
