"""The text of `--help`: the groups, their options and what each file says of itself."""

import textwrap
from pathlib import Path
from typing import Any

from compress.paths import option_files, options

GROUPS = {
    "data": "images and their augmentation",
    "method": "how the student is trained",
    "mixup": "blends pairs of training images",
    "pruning": "weights or channels that the student does without",
    "loss": "what training minimises (the method chooses a default)",
    "optimizer": "also optimizer@teacher.training.optimizer=...",
    "scheduler": "learning rate over the run; also scheduler@teacher.training.scheduler=...",
    "quantizer": "what quantizes the best checkpoint",
    "export": "the files of each variant; several formats at once: export=[onnx,openvino]",
    "trainer": "where and how long",
    "logger": "where metrics go",
    "experiment": "whole recipes",
    "hydra/launcher": "who runs the jobs of a sweep; left out, this process, one after the other",
}
HEAD = """\
compress: distil a student from a teacher, quantize it, and see the accuracy per byte.

  python scripts/run.py method=dkd student=resnet18           one run
  python scripts/run.py -m method=kd,dkd seed=0,1             a sweep: every combination
  python scripts/run.py experiment=quickstart --dry-run       sizes and an estimate, nothing is trained
  python scripts/run.py resume=outputs/runs/DIRECTORY         continue an interrupted run; resume=latest: the last
  python scripts/run.py sweep=outputs/sweeps/DIRECTORY        run what a sweep has not finished; sweep=latest
  python scripts/run.py --verify outputs/runs/DIRECTORY       read a finished run again: does everything in it hold?

  --cfg job       print the composed configuration        --help       this text
  --dry-run       print models, sizes and times           -m           sweep over comma-separated values
  --config-dir D  a folder of YAML files of your own, laid out as conf/
  --debug         show the traceback of whatever fails

Choose an option with group=option, set a key with group.key=value, add a key with +group.key=value."""


def help_text() -> str:
    """Groups and options, with the first comment line of each option's file."""
    indented: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "  "}
    models = textwrap.fill("  ".join(options("model")), 100, break_on_hyphens=False, **indented)
    parts = [HEAD]
    parts.append(
        f"student, teacher, peer: the networks (peer=none: copies of the student)\n{models}\n"
        "  teacher=ensemble teacher.members=[resnet50,wrn_40_2]  the mean of their logits"
    )
    for group, purpose in GROUPS.items():
        lines = [f"{group}: {purpose}"]
        files = option_files(group)
        width = max(map(len, files))
        lines += [f"  {stem:<{width}}  {_first_comment(file)}" for stem, file in files.items()]
        parts.append("\n".join(lines))
    parts.append(
        "Keys of an option: --cfg job, or the files in conf/. "
        "Other keys: seed, output_directory, stages (runs one after the other), grid (what a sweep goes through)."
    )
    return "\n\n".join(parts)


def _first_comment(file: Path) -> str:
    """What an option's file says of itself in its first line."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("# ") and not line.startswith("# @package")]
    return comments[0].removeprefix("# ").strip() if comments else ""
