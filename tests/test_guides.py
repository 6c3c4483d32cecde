"""The guides against what they describe: a table of options has a row for each of them."""

import re
from pathlib import Path

import pytest
import torch

from compress.models import available, build, count_macs, count_parameters
from compress.models.timm_model import TimmModel
from compress.paths import options

DOCS = Path(__file__).parents[1] / "docs"
ROW = re.compile(
    r"^\| `(\w+)`[^|]*\| ([^|]+) \| ([\d,]+) \| ([\d,]+) \| (torchvision|mdistiller|timm) \|$", re.MULTILINE
)
ROWS = {stem: rest for stem, *rest in ROW.findall((DOCS / "models.md").read_text(encoding="utf-8"))}


# A class of the user's has no size of its own.
STEMS = [stem for stem in available() if stem != "module"]


def first_cells(page, heading):
    """The words in code that begin the rows of the table below `heading`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    table = re.search(rf"^\| `{heading}=`.*\n(?:\|.*\n)+", text, re.MULTILINE)[0]
    return re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)))


def test_every_model_has_a_row():
    assert sorted(ROWS) == STEMS


@pytest.mark.parametrize("stem", STEMS)
def test_a_row_says_what_the_model_has(stem):
    images, parameters, macs, keys = ROWS[stem]
    with torch.device("meta"):  # shapes are enough
        model = build(stem, 10)
        assert f"{count_parameters(model):,}" == parameters
        assert f"{count_macs(model, (3, 32, 32)):,}" == macs
        resized = getattr(model, "input_size", None)
        assert images == (f"resized to {resized}" if resized else "8 or more" if _needs_8(model) else "any")
    assert (keys == "timm") == isinstance(model, TimmModel)


def _needs_8(model):
    model.eval()(torch.empty(1, 3, 8, 8))
    try:
        model(torch.empty(1, 3, 7, 7))
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize(
    ("page", "group"),
    [
        ("data.md", "data"),
        ("methods.md", "method"),
        ("methods.md", "mixup"),
        ("training.md", "optimizer"),
        ("pruning.md", "pruning"),
        ("quantization.md", "quantizer"),
        ("runtimes.md", "export"),
        ("wandb.md", "logger"),
        ("sweeps.md", "hydra/launcher"),
    ],
)
def test_every_option_has_a_row_in_its_guide(page, group):
    optional = {"none"}  # leaves the group out
    assert set(first_cells(page, group)) - optional == set(options(group)) - optional
