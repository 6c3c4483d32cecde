"""Tuning after quantization: what is no code is trained until the logits come near to those of the float network.

The cheap step between post-training quantization and training on the grids (Zhang & Saab 2025, 2508.20293, tune norms
alone). No labels are read, and the numbers are those that a file holds anyway, so that it keeps its size.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compress.arguments import Count, Positive, Seed, check_fields
from compress.errors import UserError, first_line
from compress.models.canonical import layer_of
from compress.models.inference import full_float32
from compress.quantization.activations import InputQuantizer, attach_input_quantizer, input_quantizers
from compress.quantization.biases import round_biases, short_biases
from compress.quantization.calibration import BATCH, walk
from compress.quantization.grid import Grid, per_channel
from compress.quantization.options import Progress, silent
from compress.quantization.preparation import Prepared
from compress.quantization.quantized import SMALLEST, QuantizedLayer, QuantizedModel, float_state, in_half


@dataclass(frozen=True)
class Tuning:
    """How long and how fast scales, biases and norms are trained: Adam, from `learning_rate` along a cosine to zero.

    images: how many training images the caller should pass; each is seen once in each of `epochs`, in an order drawn
    from `seed`. A scale moves by the share `learning_rate` of itself in a step, other numbers by that much.
    """

    images: Count = 4096
    epochs: Count = 3
    learning_rate: Positive = 3e-3
    batch_size: Count = 128
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)


class Tuner:
    """Tunes quantizations of one network, whose float logits are computed once.

    Trained are the scales of the grids (one for a layer whose channels all have the same), and all parameters of one
    dimension: biases and what norms multiply and add. Codes, zero points, statistics of norms, matrices and kernels
    that stayed float and the grids of inputs stay. Numbers that a file kept in float16 are float16 again afterwards.
    """

    @full_float32()
    @torch.no_grad()
    def __init__(self, tuning: Tuning, prepared: Prepared, images: Sequence[Tensor]) -> None:
        self.tuning, self.prepared = tuning, prepared
        self.images = torch.cat([batch.to(prepared.images[0]) for batch in images])[: tuning.images]
        logits = [prepared.analog(part.clone()) for part in self.images.split(BATCH)]
        self.expected = torch.cat(logits).log_softmax(1)

    @full_float32(repeatable=True)
    def __call__(self, quantized: QuantizedModel, progress: Progress = silent) -> QuantizedModel:
        """A tuned copy of `quantized`, with the errors of its layers measured anew on the calibration images.

        Raises UserError where the divergence does not stay finite.
        """
        trained = _Trained(quantized)
        batches = self._batches()
        optimizer = torch.optim.Adam(trained.parameters, lr=self.tuning.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        for step, chosen in enumerate(batches, 1):
            divergence = self._divergence(trained, chosen)
            optimizer.zero_grad()
            try:
                divergence.backward()
            except RuntimeError as failure:
                raise UserError(
                    f"quantizer.tune: found a network without gradients ({first_line(failure)}); accepted: null"
                ) from failure
            optimizer.step()
            schedule.step()
            progress(step, len(batches), f"tuned to a divergence of {divergence.item():.4f}")
        self._divergence(trained, batches[-1])
        return self._measured(trained.finished(quantized))

    def _batches(self) -> list[Tensor]:
        """Which images the steps of all epochs see."""
        generator = torch.Generator().manual_seed(self.tuning.seed)
        orders = [torch.randperm(len(self.images), generator=generator) for _ in range(self.tuning.epochs)]
        return [chosen.to(self.images.device) for order in orders for chosen in order.split(self.tuning.batch_size)]

    @torch.enable_grad()
    def _divergence(self, trained: "_Trained", chosen: Tensor) -> Tensor:
        """KL(float || quantized) in nats an image."""
        logits, expected = trained(self.images[chosen]).log_softmax(1), self.expected[chosen]
        divergence = F.kl_div(logits, expected, reduction="batchmean", log_target=True)
        if not bool(divergence.isfinite()):
            raise UserError(
                f"quantizer.tune: found logits that are not finite at the learning_rate {self.tuning.learning_rate:g}; "
                "accepted: a lower one"
            )
        return divergence

    def _measured(self, tuned: QuantizedModel) -> QuantizedModel:
        prepared, names = self.prepared, [*tuned.layers, *tuned.tied]

        def keep(name: str, quantized: list[Tensor], analog: list[Tensor]) -> None:
            """Leaves the layer as it is."""

        errors = walk(prepared.analog, tuned.model, prepared.graph, prepared.images, names, keep, apart=True)
        return replace(tuned, layers={name: replace(one, error=errors[name]) for name, one in tuned.layers.items()})


class _Trained:
    """The numbers of a quantized network that are trained, and the network as a function of them and of images."""

    def __init__(self, quantized: QuantizedModel) -> None:
        self.network = copy.deepcopy(quantized.model).requires_grad_(False)
        for name, quantizer in input_quantizers(self.network).items():
            attach_input_quantizer(layer_of(self.network, name), _StraightThrough(quantizer))
        self.steps, self.log_scales = {}, {}
        for name, layer in quantized.layers.items():
            scale = layer.grid.scale
            self.steps[name] = replace(layer.grid, scale=torch.ones_like(scale)).dequantize(layer.codes)
            one = scale[:1] if bool((scale == scale[0]).all()) else scale
            self.log_scales[name] = one.log().requires_grad_()
        self.vectors = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in self.network.named_parameters()
            if parameter.dim() <= 1 and parameter.is_floating_point()
        }

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.log_scales.values(), *self.vectors.values()]

    def __call__(self, images: Tensor) -> Tensor:
        weights = {
            f"{name}.weight": steps * per_channel(self.log_scales[name].exp(), steps)
            for name, steps in self.steps.items()
        }
        logits: Tensor = functional_call(self.network, self.vectors | weights, images)
        return logits

    @torch.no_grad()
    def finished(self, quantized: QuantizedModel) -> QuantizedModel:
        """A copy of `quantized` with these numbers."""
        network = copy.deepcopy(quantized.model)
        layers: dict[str, QuantizedLayer] = {}
        for name, layer in quantized.layers.items():
            grid = layer.grid
            tuned = self.log_scales[name].exp().expand_as(grid.scale).contiguous()
            scale = _as_precise(tuned, grid.scale, least=SMALLEST)
            layers[name] = replace(layer, grid=Grid(scale, grid.zero_point, grid.levels))
            layer_of(network, name).weight.copy_(layers[name].grid.dequantize(layer.codes))
        short = short_biases(quantized)
        for name, value in self.vectors.items():
            parameter = network.get_parameter(name)
            parameter.copy_(_as_precise(value, short.get(name, parameter)))
        round_biases(network, layers, quantized.tied)
        state = float_state(network, [*layers, *quantized.tied])
        return replace(quantized, model=network, layers=layers, float_state=state)


def _as_precise(tuned: Tensor, before: Tensor, least: float = -math.inf) -> Tensor:
    """`tuned`, rounded to float16 where that has all of `before`, unless one becomes infinite or less than `least`."""
    rounded = in_half(tuned, least)
    return tuned if rounded is None or not torch.equal(before, before.half().to(before.dtype)) else rounded


class _StraightThrough(nn.Module):
    """An input quantizer that passes gradients through its rounding, but not to what lies off its grid."""

    def __init__(self, quantizer: InputQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        steps = self.quantizer.steps(x)
        return (steps + (steps.round() - steps).detach()) * self.quantizer.scale
