"""How much an error of each layer's output changes the logits, from one backward pass over the calibration images.

The divergence KL(p || p~) between the predictions of two networks is, for a small change D of a layer's weight,
tr(D F D^T) / 2 with the Fisher information F, the mean of squared gradients of log p(y) for classes y drawn from p.
Here F is taken as a multiple of the Gram of the layer's inputs, which makes the divergence a multiple of the output
error: its `curvature`. That is measured for errors of weights that are independent of each other, by gradients of the
weight, one for each image, in which the errors at all positions add up as they will. Their products with each other are
the coupling of the rows of the weight, see `compress.quantization.coupled_rows`.

Logits are divided by TEMPERATURE first: a network is certain of most images that it was trained on, and where it is,
no small change of a logit shows.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from compress.errors import UserError, first_line
from compress.models.canonical import Layer, layer_of
from compress.quantization.moments import CHUNK
from compress.quantization.patches import live_columns, patches, with_rows
from compress.quantization.preparation import Prepared

TEMPERATURE = 4.0
# Few images say little about a layer that they hardly need: for an error as large as its outputs vary, none counts less
# than this share of the mean. Of a network that is certain of every image the mean is this many nats.
LEAST, FAINT = 1e-3, 1e-6
# Positions, at least, over which the mean of an input is taken.
CENTRED = 64
# The share of their mean that is added to what errors of single rows count, because images say only so much of how
# errors of two rows cancel. By the divergence of a ResNet-20 and a ResNet-8x4 with 16 to 512 images: 0.3 to 1 are alike
# for many, 0.1 is worse, and 3 is worse for few.
SHRINK = 1.0
# The coupling of more rows than these is not worth its time.
MOST_ROWS = 4096
# The share of their mean by which inputs differ that are all the same.
ROUNDING = 64 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class LayerSensitivity:
    """What `measure` finds of one layer, in sums over all images.

    curvature: nats for a unit of squared output error. input_energy: the squares of an input, less the mean, summed
    over all positions, in the mean over the `live` ones of a row's d inputs (None: all of them, see `live_columns`).
    output_energy: the same of the outputs, summed over the N rows. coupling: what products of errors of two rows of a
    group count beside that, (groups, N / groups, N / groups), with determinants whose product is 1; None: rows are
    independent, and each counts the same.
    """

    curvature: float
    input_energy: float
    output_energy: float
    live: Tensor | None
    coupling: Tensor | None = None

    @property
    def divergence(self) -> float:
        """Nats for independent errors of the output as large as the outputs vary."""
        mean = 1.0 if self.coupling is None else float(self.coupling.diagonal(dim1=1, dim2=2).mean())
        return self.curvature * mean * self.output_energy


def measure(prepared: Prepared, coupled: bool = False, seed: int = 0) -> dict[str, LayerSensitivity]:
    """The sensitivity of each quantized layer of a prepared network; `coupled`: with the coupling of its rows.

    Raises UserError for a network that has no gradients, or not finite ones.
    """
    network, tied = prepared.analog, prepared.choice.tied
    sums = {name: _Sums(coupled) for name in prepared.order}
    holders = {name: sums[tied.get(name, name)] for name in [*prepared.order, *tied]}
    generator = torch.Generator().manual_seed(seed)
    with _frozen(network), torch.enable_grad(), _recording(network, holders):
        for batch in prepared.images:
            try:
                logits = network(batch.detach().requires_grad_().clone()) / TEMPERATURE
                drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator).to(logits.device)
                logits.log_softmax(1).gather(1, drawn).sum().backward()
            except RuntimeError as failure:
                raise UserError(
                    f"{network._get_name()}: found a network without gradients on the calibration images "
                    f"({first_line(failure)}); accepted: finite logits with gradients, or only quantizer.bits"
                ) from failure
    for name, one in sums.items():
        if not math.isfinite(one.curvature):
            raise UserError(f"{name}: found inputs or gradients that are not finite on the calibration images")
    mean = sum(one.curvature * one.output_energy for one in sums.values()) / len(sums)
    least = LEAST * max(mean, FAINT)
    return {name: one.finished(layer_of(network, name), least) for name, one in sums.items()}


class _Sums:
    """What is summed of one layer, over its calls and those of the layers that share its weight."""

    def __init__(self, coupled: bool = False) -> None:
        self.squared_gradients = self.power = self.input_energy = self.output_energy = 0.0
        self.live: Tensor | None = None
        self.coupled, self.coupling = coupled, torch.zeros(())

    @property
    def curvature(self) -> float:
        return self.squared_gradients / (2 * self.power) if self.power > 0 else 0.0

    def finished(self, layer: Layer, least: float) -> LayerSensitivity:
        """What was summed, with a `divergence` of at least `least`."""
        if self.input_energy > 0 and self.output_energy > 0:
            curvature = max(self.curvature, least / self.output_energy)
            coupling, scale = _normalised(self.coupling)
            return LayerSensitivity(scale * curvature, self.input_energy, self.output_energy, self.live, coupling)
        # Where no input varies, `compress.quantization.moments` has a Gram of ones on the diagonal.
        energy = float(layer.weight.detach().square().sum()) or 1.0
        return LayerSensitivity(least / energy, 1.0, energy, self.live)

    @torch.no_grad()
    def add(self, layer: Layer, inputs: Tensor, outputs: Tensor, gradient: Tensor) -> None:
        """One call: inputs as the layer takes them, which this overwrites, its outputs and the gradient of these."""
        if isinstance(layer, nn.Conv1d):
            layer, inputs = with_rows(layer), inputs.unsqueeze(2)
        if isinstance(layer, nn.Linear):
            outputs, gradient = (x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2) for x in (outputs, gradient))
        outputs, gradient = outputs.flatten(2), gradient.flatten(2)  # (B, N, places)
        self.live = live_columns(layer, inputs)
        self.output_energy += float((outputs - outputs.mean((0, 2), keepdim=True)).square_().sum())
        _, rows, places = gradient.shape
        depth = math.prod(layer.weight.shape[1:])
        # Inputs are centred by the mean over as many images as are taken together.
        together = max(-(-CENTRED // places), CHUNK // (depth * places + min(rows * depth, places**2)))
        for some, their in zip(inputs.split(together), gradient.split(together), strict=True):
            columns = patches(layer, some)  # (groups, d, B * places)
            if self.live is not None:
                columns = columns[:, self.live]
            groups, depth, count = columns.shape
            mean = columns.mean(2, keepdim=True)
            # In place, because it is large; first copied where patches may overlap in memory.
            columns = (columns if columns.is_contiguous() else columns.clone()).sub_(mean)
            slopes, columns = their.unflatten(1, (groups, rows // groups)), columns.unflatten(2, (len(some), places))
            if self.coupled and rows <= MOST_ROWS:
                coupling = _gradient_products(slopes, columns)
                squared_gradients = float(coupling.diagonal(dim1=1, dim2=2).sum())
            else:
                coupling, squared_gradients = torch.zeros(()), _squared_gradients(slopes, columns)
            power = float(columns.square_().sum())
            if power <= ROUNDING**2 * count * float(mean.square().sum()):
                continue  # they do not vary
            self.squared_gradients += squared_gradients
            self.coupling = self.coupling.to(coupling) + coupling
            self.power += power * rows / groups
            self.input_energy += power / (groups * depth)


def _squared_gradients(slopes: Tensor, columns: Tensor) -> float:
    """Squares of the gradients of a weight, one for each image and group, summed.

    slopes (B, groups, n, places): the gradients of outputs; columns (groups, d, B, places): the inputs. With few places
    their products with each other are fewer than the n d of a weight.
    """
    _, _, rows, places = slopes.shape
    if places * (rows + columns.shape[1]) < rows * columns.shape[1]:
        of_slopes = torch.einsum("bgnp,bgnq->bgpq", slopes, slopes)
        return float((of_slopes * torch.einsum("gdbp,gdbq->bgpq", columns, columns)).sum())
    return float(torch.einsum("bgnp,gdbp->gbnd", slopes, columns).square().sum())


def _gradient_products(slopes: Tensor, columns: Tensor) -> Tensor:
    """Products of the gradients of the rows of a weight, one for each image, summed: (groups, n, n); as above."""
    _, _, rows, places = slopes.shape
    depth = columns.shape[1]
    if places * (places * (depth + rows) + rows**2) < rows * depth * (places + rows):
        carried = slopes @ torch.einsum("gdbp,gdbq->bgpq", columns, columns)
        return torch.einsum("bgnp,bgmp->gnm", carried, slopes)
    gradients = torch.einsum("bgnp,gdbp->gnbd", slopes, columns).flatten(2)
    return gradients @ gradients.mT


def _normalised(products: Tensor) -> tuple[Tensor | None, float]:
    """(the coupling, what the curvature for rows of which each counts the same is multiplied with beside it)."""
    mean = products.diagonal(dim1=1, dim2=2).mean() if products.dim() else products
    if not mean > 0:
        return None, 1.0
    coupling = products.double() / mean
    coupling = (coupling + coupling.mT) / 2
    coupling.diagonal(dim1=1, dim2=2).add_(SHRINK)
    coupling /= 1 + SHRINK
    scale = float(torch.linalg.slogdet(coupling).logabsdet.sum() / coupling[..., 0].numel())
    return (coupling / math.exp(scale)).to(products.dtype), math.exp(scale)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Without gradients of the parameters, which nothing reads."""
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@contextmanager
def _recording(network: nn.Module, sums: Mapping[str, _Sums]) -> Iterator[None]:
    """While it lasts, the sums of each named layer are added to whenever a gradient reaches an output of it."""

    def record(one: _Sums) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def of_call(layer: nn.Module, arguments: tuple[Tensor, ...], outputs: Tensor) -> None:
            # Copies, because an operation in place may follow.
            inputs, values = arguments[0].detach().clone(), outputs.detach().clone()
            outputs.register_hook(lambda gradient: one.add(cast(Layer, layer), inputs, values, gradient))

        return of_call

    handles = [layer_of(network, name).register_forward_hook(record(one)) for name, one in sums.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
