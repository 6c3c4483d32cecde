"""docs/reference.md has every option and key of conf/, with what the code accepts and what a comment says."""

from pathlib import Path

from compress.config.compose import compose_jobs
from compress.config.reference import reference
from compress.paths import CONF

PAGE = Path(__file__).parents[2] / "docs/reference.md"


def rows():
    """The cells of every key on the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return [row for row in cells if len(row) == 4]


def keys(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) or hasattr(value, "items"):
            yield from keys(value, f"{prefix}{key}.")
        elif key not in ("_target_", "_partial_", "stem"):
            yield f"{prefix}{key}"


def test_the_page_is_what_conf_and_the_code_say():
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "docs/reference.md: found an old one; accepted: make reference"
    )


def test_every_option_has_its_heading():
    text = PAGE.read_text(encoding="utf-8")
    for file in CONF.rglob("*.yaml"):
        group = str(file.parent.relative_to(CONF))
        heading = f"{group.replace('model', 'student')}={file.stem}"
        if group not in (".", "search") and not group.endswith("options"):
            assert f"\n### {heading}\n" in text, heading


def test_every_key_of_a_run_stands_on_the_page_with_its_meaning():
    [job] = compose_jobs(["method=kd", "teacher=resnet20", "student=resnet8", "quantizer=gpfq", "logger=wandb"])
    said = {name.strip("`"): meaning for name, _, _, meaning in rows()}
    for key in keys(job.config):
        if key.startswith(("hydra.", "teacher.training.optimizer.", "teacher.training.scheduler.")):
            continue
        assert said[key.replace("teacher.model.", "student.")], key


def test_what_a_key_takes_is_what_its_refusal_says():
    takes = {name.strip("`"): accepted for name, _, accepted, _ in rows()}
    assert takes["quantizer.grid.alphabet"] == "exact, published, narrow"
    assert takes["quantizer.first_last_bits"].endswith("or null")
    assert takes["optimizer.decay_norm_and_bias"] == "true or false"
    assert takes["data.validation_fraction"] == "a number greater than 0 and less than 1"
