"""Networks of the user's own class: named, given, and never imported because a file says so."""

import sys

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.models import architecture, build, check_options, rebuild
from compress.models.own_class import adapted, check, class_name, given, options_of
from tests.models.odd_networks import CLASSES, SHAPE, Named, Pair, make


class Wide(nn.Module):
    def __init__(self, num_classes: int, width: int = 4):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.stem(images).relu().mean((2, 3)))


class Failing(nn.Module):
    def __init__(self):
        raise ValueError("of no use\nat all")


def fixed(width=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(432, width))


HERE = __name__


def test_a_class_is_built_with_its_arguments_and_the_number_of_classes():
    network = build("module", 7, target=f"{HERE}.Wide", arguments={"width": 5})
    assert network.head.weight.shape == (7, 5)
    assert build("module", 7, target=f"{HERE}.fixed")[1].out_features == 3  # it takes no number of classes


@pytest.mark.parametrize("network", [Named, Pair])
def test_it_returns_its_logits_alone(network):
    built = build("module", CLASSES, target=class_name(network()))
    assert built(torch.zeros(2, *SHAPE)).shape == (2, CLASSES)
    model = make(network)
    copy = adapted(given(model), CLASSES)
    assert copy(torch.zeros(2, *SHAPE)).shape == (2, CLASSES)
    assert not isinstance(model(torch.zeros(2, *SHAPE)), torch.Tensor)  # what was given stays as it is


MISTAKES = [
    ({"target": f"{HERE}.Absent"}, f"target: found '{HERE}.Absent', which cannot be imported"),
    ({"target": f"{HERE}.Failing"}, "Failing(): of no use; accepted"),
    ({"target": f"{HERE}.Wide", "arguments": {"depth": 3}}, "Wide(depth=3): "),
    ({"target": "builtins.str"}, "str: found what makes a str; accepted: a torch.nn.Module"),
    ({"target": "MyNet"}, "found 'MyNet'; accepted: MODULE.CLASS"),
    ({"target": f"{HERE}.Wide", "from_python": True}, "was given from Python; accepted: it once more"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_class_that_cannot_be_used_is_one_line(options, message):
    with pytest.raises(UserError) as mistake:
        build("module", 10, **options)
    assert message in str(mistake.value)
    assert len(str(mistake.value).splitlines()) == 1


def test_its_arguments_are_checked_before_it_is_built():
    for arguments, message in (
        ({"depth": 3}, "student.arguments.depth: found an unknown key; accepted: width"),
        ({"width": "wide"}, "student.arguments.width: found 'wide'; accepted: a whole number"),
    ):
        options = check_options("module", {"target": f"{HERE}.Wide", "arguments": arguments}, "student")
        with pytest.raises(UserError) as mistake:
            check(options, "student")
        assert str(mistake.value) == message
    with pytest.raises(UserError, match=r"student\.target: found 'absent\.Net', which cannot be imported"):
        check(check_options("module", {"target": "absent.Net"}, "student"), "student")


def test_a_description_never_imports_the_class_that_it_names():
    for options in ({"target": "antigravity.Net"}, {"target": "antigravity.Net", "from_python": False}, {}):
        with pytest.raises(UserError, match="no file may name code to run; accepted: network="):
            rebuild({"stem": "module", "options": options, "num_classes": 3})
    assert "antigravity" not in sys.modules


def test_a_description_is_rebuilt_from_the_network_or_its_class():
    network = Wide(4, width=6)
    described = architecture({"stem": "module", **options_of(network)}, 4, network, Wide(4, width=6))
    assert described["options"]["target"] == f"{HERE}.Wide"
    assert rebuild(described, network).head.weight.shape == (4, 6)
    described["options"]["arguments"] = {"width": 6}
    assert rebuild(described, Wide).head.weight.shape == (4, 6)
