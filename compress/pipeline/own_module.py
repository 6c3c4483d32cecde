"""`compress.quantize(network, images)`: any network, with weights of its own, quantized and written without a run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from compress import models
from compress.arguments import build
from compress.checksums import digest
from compress.config.compose import compose_jobs
from compress.errors import UserError
from compress.export.description import NetworkDescription
from compress.export.encodings import layer_bytes
from compress.export.formats import exporter_called, exporter_of, read_any
from compress.export.packed import SAID, Packed, file_bytes
from compress.models import own_class
from compress.models.baking import copied
from compress.models.outputs import finding_logits, logits
from compress.quantization import Measures, QuantizedModel, Quantizer
from compress.quantization.comparisons import compare
from compress.quantization.options import silent
from compress.quantization.rate_search import budget_bytes
from compress.results.surroundings import versions_in_files

# The share of the weights that may stay float without a word.
SMALL_SHARE = 0.02
IMAGES = "accepted: images (N, C, H, W) as the network takes them, in batches of such, or in a DataLoader"


@dataclass(frozen=True)
class QuantizedNetwork:
    """What `compress.quantize` returns. `quantized` has the codes; `images` are those that it was calibrated on.

    budget: the bytes that a packed file may have, None where no budget was given.
    """

    quantized: QuantizedModel
    quantizer: Quantizer
    images: Tensor
    description: NetworkDescription
    budget: int | None = None

    @property
    def network(self) -> nn.Module:
        """The network that computes with the quantized weights: images to logits, in eval mode."""
        return self.quantized.model

    def table(self) -> str:
        """Layer, bits, relative output error and bytes of codes, a line for each layer, and what stayed float."""
        rows = [("layer", "bits", "error", "bytes")]
        for name, layer in self.quantized.layers.items():
            error = "" if layer.error is None else f"{layer.error:.4f}"
            rows.append((name, f"{layer.bits:.3g}", error, f"{layer_bytes(layer):,}"))
        rows.append(("file", "", "", f"{file_bytes(self.quantized, self.description):,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ]
        if self.quantized.float_share > SMALL_SHARE:
            reasons = "; ".join(f"{name} {reason}" for name, reason in self.quantized.skipped.items())
            lines.append(f"{100 * self.quantized.float_share:.1f} % of the weights stayed float: {reasons}")
        return "\n".join(lines)

    def save(self, path: str | Path, **about: Any) -> int:
        """Writes a packed file, see `export`, which `compress.load` reads; returns its bytes."""
        return self.export(path, format="packed", **about)

    def export(
        self,
        path: str | Path,
        format: str | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        standard_deviation: Sequence[float] | None = None,
    ) -> int:
        """Writes a file of the format that its suffix says, or of that option of `conf/export`; returns its bytes.

        class_names, mean and standard_deviation: in place of those that `quantize` was given. Raises UserError for
        values that do not fit, where the format cannot hold the network, and for a packed file beyond the budget.
        """
        path = Path(path)
        exporter = exporter_of(path) if format is None else exporter_called(format)
        if not path.name.endswith(exporter.suffix):
            raise UserError(f"{path}: found another suffix than that of {format}; accepted: {exporter.suffix}")
        exporter.check(self.quantizer)
        about = _described(self.description, class_names, mean, standard_deviation)
        if self.budget is not None and isinstance(exporter, Packed):
            over = file_bytes(self.quantized, about) - self.budget
            if over > 0:
                raise UserError(
                    f"{path}: found a file {over:,} bytes over the budget of {self.budget:,}; accepted: class_names, "
                    "mean and standard_deviation where compress.quantize is called, whose budget then counts them"
                )
        exporter.write(path, self.quantized, about, [self.images])
        return path.stat().st_size


def quantize(
    network: nn.Module,
    images: Any,
    bits: int | None = None,
    quantizer: str = "gpfq",
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    standard_deviation: Sequence[float] | None = None,
    **keys: Any,
) -> QuantizedNetwork:
    """`network`, which stays as it is, quantized on so many of `images` as the key `calibration_images` says.

    It gets `bits` bits, or else the `rates=` bits a weight or the `budget=` bytes among the keys, or else 4 bits. With
    `tune={"images": 4096}` among the keys it is then tuned on so many.

    images: a tensor (N, C, H, W), an iterable of such batches, or of sequences that begin with one, as a DataLoader is;
    normalised as the network takes them. Of a tensor, or of a list of batches, those that are used are spread evenly
    over the whole, the same ones each time, so that images sorted by class are of all classes. Of a DataLoader and of
    any other iterable they are the first, which then have to be of all classes: shuffle it.

    class_names, mean and standard_deviation are what files say, and count in a budget: the names of the network's
    outputs, in their order, or their numbers if left out; and by which images in 0..1 are normalised for the network,
    one value or one per channel, or nothing, where it takes images in 0..1. Of a network that `load` or a `Predictor`
    has read and nobody has changed, the file that it came from says all three.

    quantizer: an option of `conf/quantizer`. keys: the keys of its file, nested ones as mappings,
    `grid={"scale": "max_abs"}`, or with dots, `**{"grid.scale": "max_abs"}`. Raises UserError for whatever cannot be
    done, and where folding its BatchNorm or rounding to 16 bits already changes what the network computes.
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"network: found a {type(network).__name__}; accepted: a torch.nn.Module")
    default = [] if "rates" in keys else [4]
    built = _quantizer(quantizer, {**keys, "bits": default if bits is None else bits})
    calibration, *tuning = _chosen(images, built.calibration_images, *([built.tune.images] if built.tune else []))
    described = _about(network, calibration)
    network = _returning_one_width(network, calibration[:2])
    compare(network, [calibration], built.skip)
    description = replace(
        _described(_with_classes(described, network, calibration[:1]), class_names, mean, standard_deviation),
        extra={"configuration": digest(repr(built)), "versions": versions_in_files()},
    )
    float_bytes = file_bytes(network, description) if built.budget is not None else 0
    budget = None if built.budget is None else budget_bytes(built.budget, float_bytes)
    measures = Measures(partial(file_bytes, description=description), float_bytes)
    [variant] = built.variants(network, [calibration], measures, silent, tuning)
    return QuantizedNetwork(variant.model, built, calibration, description, budget)


def load(path: str | Path, network: own_class.OwnNetwork | None = None) -> tuple[Any, dict[str, Any]]:
    """(network in eval mode, description) of a file that `compress` wrote, in a run or by `QuantizedNetwork.save`.

    network: one of the class that the file names, or the class, where that is none of `conf/model`; a file can import
    nothing. It stays as it is. The weights are bit for bit those that were saved. Raises UserError in one line for a
    file that is damaged, or that does not fit the network.
    """
    return read_any(Path(path), torch.get_num_threads(), network)


def _quantizer(stem: str, keys: Mapping[str, Any]) -> Quantizer:
    """The quantizer of an option with some of its keys replaced, for one network."""
    [job] = compose_jobs(["method=supervised", f"quantizer={stem}"])
    if not job.config.quantizer:
        raise UserError("quantizer: found none, which leaves the network as it is; accepted: another, such as gpfq")
    node = job.config.quantizer
    with open_dict(node):
        for key, value in keys.items():
            OmegaConf.update(node, key, value, merge=True)
    built: Quantizer = build(node, "quantizer", Quantizer)
    if built.max_drop is not None:
        raise UserError("quantizer.max_drop: found it without labelled images to measure it on; accepted: budget")
    if built.latency is not None:
        raise UserError("quantizer.latency: found it without a runtime to measure it in; accepted: scripts/quantize.py")
    if built.budget is None and len(built.widths) + len(built.coded_rates) != 1:
        raise UserError(
            f"bits: found {[*built.widths]} and the rates {[*built.coded_rates]}; "
            "accepted: one width, one of rates, or budget=SIZE"
        )
    return built


def _chosen(images: Any, *counts: int) -> list[Tensor]:
    """For each of `counts` so many of `images`, (N, C, H, W), or all if there are fewer.

    Of a tensor or a sequence of batches one from each of `count` equal parts; of what can only be iterated the first.
    Raises UserError for what are no images.
    """
    if not isinstance(images, Iterable):
        raise UserError(f"images: found a {type(images).__name__}; {IMAGES}")
    whole = isinstance(images, Tensor | Sequence)
    batches: list[Tensor] = []
    for batch in [images] if isinstance(images, Tensor) else images:
        tensor = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
        if not isinstance(tensor, Tensor) or tensor.dim() != 4 or not tensor.is_floating_point():
            shape = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"images: found {shape}; {IMAGES}")
        if batches and tensor.shape[1:] != batches[0].shape[1:]:
            shapes = f"{tuple(batches[0].shape[1:])} and {tuple(tensor.shape[1:])}"
            raise UserError(f"images: found the shapes {shapes}; accepted: images of one shape")
        batches.append(tensor.detach())
        if not whole and sum(map(len, batches)) >= max(counts):
            break
    total = sum(map(len, batches))
    if not total:
        raise UserError(f"images: found none; {IMAGES}")
    chosen = [_at(batches, _spread(total, count) if whole else torch.arange(min(total, count))) for count in counts]
    if not all(part.isfinite().all() for part in chosen):
        raise UserError("images: found values that are not finite; accepted: finite ones")
    return chosen


def _spread(total: int, count: int) -> Tensor:
    """Ascending indices below `total`, one in each of `count` equal parts, or all of them.

    Where in its part is drawn, always alike: images of ten classes in turn would be of one class at a fixed distance.
    """
    starts = torch.arange(min(total, count) + 1) * total // min(total, count)
    draws = torch.rand(len(starts) - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return starts[:-1] + (draws * starts.diff()).long()


def _at(batches: Sequence[Tensor], indices: Tensor) -> Tensor:
    """The images at these ascending `indices` of all `batches` one after the other."""
    ends = torch.tensor([len(batch) for batch in batches]).cumsum(0).tolist()
    return torch.cat(
        [
            batch[indices[(indices >= end - len(batch)) & (indices < end)] - (end - len(batch))]
            for batch, end in zip(batches, ends, strict=True)
        ]
    )


def _returning_one_width(network: nn.Module, images: Tensor) -> nn.Module:
    try:
        return finding_logits(network, images.to(next(network.parameters(), images)))
    except UserError as mistake:
        raise UserError(f"network: {mistake}") from None


def _about(network: nn.Module, images: Tensor) -> NetworkDescription:
    """What is known before the network is traced: without a file of it neither the number nor the names of classes."""
    said = getattr(network, SAID, None)
    if said is not None and _is_as_its_file_says(network, said["architecture"], images[:2]):
        kept = {key: said[key] for key in ("architecture", "class_names", "mean", "standard_deviation")}
        return NetworkDescription(**kept, input_shape=images.shape[1:])
    architecture = {"stem": own_class.STEM, "options": own_class.options_of(network), "num_classes": 0}
    return NetworkDescription(architecture, [], [0.0], [1.0], images.shape[1:])


def _is_as_its_file_says(network: nn.Module, architecture: Mapping[str, Any], images: Tensor) -> bool:
    """Whether `network`, which may have been changed since, computes what one of that `architecture` does."""
    quiet = copied(network).eval()
    images = images.to(next(quiet.parameters(), images))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            again = models.rebuild(architecture).eval().to(images)
            again.load_state_dict(quiet.state_dict())
            return torch.allclose(logits(again(images)), logits(quiet(images)), rtol=1e-4, atol=1e-5)
    except (RuntimeError, UserError):
        return False


def _with_classes(about: NetworkDescription, network: nn.Module, images: Tensor) -> NetworkDescription:
    """`about` with as many classes as `network` has logits, called by their numbers where nothing is known of them."""
    if about.class_names:
        return about
    quiet = copied(network).eval()
    with torch.no_grad():
        outputs = logits(quiet(images.to(next(quiet.parameters(), images))))
    names = [str(index) for index in range(outputs.shape[1])]
    return replace(about, architecture={**about.architecture, "num_classes": len(names)}, class_names=names)


def _described(
    about: NetworkDescription,
    class_names: Sequence[str] | None,
    mean: Sequence[float] | None,
    standard_deviation: Sequence[float] | None,
) -> NetworkDescription:
    """`about` with what is given. Raises UserError for what does not fit it."""
    classes, channels = about.architecture["num_classes"], about.input_shape[0]
    if class_names is not None and (
        isinstance(class_names, str) or not len(class_names) == len({*class_names}) == classes
    ):
        raise UserError(f"class_names: found {class_names!r}; accepted: {classes} different names, one of each output")
    if (mean is None) != (standard_deviation is None):
        raise UserError("mean: found only one of mean and standard_deviation; accepted: both or neither")
    statistics: dict[str, Any] = {}
    if mean is not None:
        statistics = {"mean": mean, "standard_deviation": standard_deviation}
    for key, values in statistics.items():
        statistics[key] = values = [values] if isinstance(values, int | float) else [float(value) for value in values]
        if len(values) not in (1, channels) or not all(map(math.isfinite, values)):
            raise UserError(f"{key}: found {values}; accepted: 1 or {channels} numbers")
        if key == "standard_deviation" and min(values) <= 0:
            raise UserError(f"{key}: found {values}; accepted: numbers greater than 0")
    names = about.class_names if class_names is None else list(class_names)
    return replace(about, class_names=names, **statistics)
