"""Which families of timm can be quantized and exported: `python scripts/benchmark.py timm_families docs/timm.md`.

Of each family, a module of `timm.models`, the smallest network for images of at most 256 pixels, with fresh weights:
quantized at 8 bits, by rounding or else by GPFQ, on four images of noise, compared on four others with the float
network, and exported to ONNX, whose logits by ONNX Runtime are compared with those of the quantized network.
Differences are relative, of the logits of all images together. A process for each network; what is measured is kept
beside the table and not measured again.
"""

import argparse
import json
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from compress.errors import UserError, first_line
from compress.files import write_text
from compress.models.canonical import difference
from compress.progress import console

LARGEST, USUAL = 256, 224  # pixels on each side; the second for a network that is made for larger images
NAMED = 600  # seconds after which the search for the smallest network is given up
QUANTIZERS = ("rtn", "gpfq")  # the second where the first is not near enough
# What counts as quantized and as exported.
QUANTIZED, WEIGHTS, EXPORTED = 0.05, 0.95, 1e-3
NOISE = 0.01  # of the images' standard deviation, to tell a network that amplifies every error
HEAD = """# timm's families

The smallest network of each family of timm {version} for images of at most 256 pixels, with fresh weights, at 8 bits by
rounding, or by GPFQ where that is not near enough. Error: relative difference of the logits from those of the float
network. ONNX: of the exported file, run by ONNX Runtime, from the quantized network. Written by
`python scripts/benchmark.py timm_families docs/timm.md`.

{quantized} of {count} are quantized within {limit:.0%} with at least {weights:.0%} of their weights, and {exported} are
exported within {onnx}. The reasons of the rest stand in their rows. An error of zero is that of a network whose fresh
head gives zeros.

| Family | Network | Pixels | Weights quantized | By | Error | ONNX | |
|---|---|---|---|---|---|---|---|
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, help="the Markdown file that is written")
    parser.add_argument("--measured", type=Path, default=Path("outputs/timm-families.jsonl"))
    parser.add_argument("--seconds", type=float, default=900, help="after which a network is given up")


def run(arguments: argparse.Namespace) -> None:
    """Measures the families that have not been measured, and writes the table."""
    arguments.measured.parent.mkdir(parents=True, exist_ok=True)
    arguments.measured.touch()
    found = {row["family"]: row for row in map(json.loads, arguments.measured.read_text().splitlines())}
    for family in _families():
        if family not in found:
            row = {"family": family, "name": None, "size": None} | (_in_a_process(_smallest, NAMED, family) or {})
            if row["name"] is not None:
                measured = _in_a_process(_measured, arguments.seconds, row["name"], row["size"])
                row |= measured or {"why": "takes too long, or ends its process"}
            console.print(f"{family}: {row}")
            found[family] = row
            with arguments.measured.open("a") as file:
                file.write(json.dumps(row) + "\n")
    write_text(arguments.table, _table([found[family] for family in sorted(found)]))


def _families() -> list[str]:
    from timm import list_modules

    return sorted(list_modules())


def _smallest(family: str) -> dict[str, Any]:
    """The network of the fewest parameters, and the side of its images; nothing where all want larger images."""
    import timm

    fitting: dict[str, tuple[int, int]] = {}
    for name in timm.list_models(module=family):
        about = timm.get_pretrained_cfg(name)
        if about is None or (about.fixed_input_size and about.input_size[-1] > LARGEST):
            continue
        size = about.input_size[-1]
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        fitting[name] = parameters, size if size <= LARGEST else USUAL
    smallest = min(fitting, key=fitting.__getitem__, default=None)
    return {"name": smallest, "size": fitting[smallest][1]} if smallest else {}


def _measured(name: str, size: int) -> dict[str, Any]:
    import timm

    import compress
    from compress.export.onnx_runtime import start

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    images, others = (torch.randn(4, 3, size, size) for _ in range(2))
    with torch.no_grad():
        expected = network(others)
    row: dict[str, Any]
    for quantizer in QUANTIZERS:
        try:
            quantized = compress.quantize(network, images, bits=8, quantizer=quantizer)
        except UserError as refusal:
            return {"why": first_line(refusal)}
        with torch.no_grad():
            found = quantized.network(others)
        row = {"by": quantizer, "error": difference(found, expected), "weights": 1 - quantized.quantized.float_share}
        if row["error"] <= QUANTIZED:
            break
    skipped = [f"{layer} {reason}" for layer, reason in quantized.quantized.skipped.items()]
    reasons = skipped[:3] if row["weights"] < WEIGHTS else []
    if row["error"] > QUANTIZED:
        with torch.no_grad():
            moved = difference(network(others + NOISE * torch.randn_like(others)), expected)
        reasons.append(f"in float, noise of {NOISE:.0%} in the images changes its logits by {moved:.1e}")
    why = "; ".join(reasons)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        try:
            quantized.export(path)
            session = start(path.read_bytes())
            each = [session.run(["logits"], {"images": image[None].numpy()})[0] for image in others]
            row["onnx"] = difference(torch.cat([torch.from_numpy(one) for one in each]), found)
        except Exception as refusal:  # of the exporter, or of ONNX Runtime, which has a class for each
            refused = first_line(refusal).removeprefix(f"{path}: ")
            why = f"{why}; {refused}".removeprefix("; ")
    return row | {"why": why}


def _in_a_process(function: Callable[..., Any], seconds: float, *arguments: Any) -> Any:
    """What `function` returns, or None where its process ends without, or not within so many seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    try:
        sender.send(function(*arguments))
    except Exception as failure:
        sender.send({"why": f"{type(failure).__name__}: {first_line(failure)}"})


def _table(rows: list[dict[str, Any]]) -> str:
    import timm

    quantized = sum(row.get("error", 1) <= QUANTIZED and row["weights"] >= WEIGHTS for row in rows)
    exported = sum(row.get("onnx", 1) <= EXPORTED for row in rows)
    facts = {"version": timm.__version__, "quantized": quantized, "count": len(rows), "limit": QUANTIZED}
    head = HEAD.format(**facts, weights=WEIGHTS, exported=exported, onnx=EXPORTED)
    return head + "".join(_lines(rows))


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        weights = f"{row['weights']:.1%}" if "weights" in row else ""
        error, onnx = (f"{row[key]:.1e}" if key in row else "" for key in ("error", "onnx"))
        why = "all its networks want larger images" if row["name"] is None else row["why"].replace("|", "\\|")
        cells = [row["family"], row["name"] or "", str(row["size"] or ""), weights, row.get("by", ""), error, onnx, why]
        yield f"| {' | '.join(cells)} |\n"
