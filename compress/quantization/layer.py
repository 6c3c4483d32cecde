"""Quantizing one layer: its grid, its codes and its corrected bias, from the moments of its inputs."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.canonical import Layer
from compress.quantization.grid import Grid, spanning
from compress.quantization.moments import Moments
from compress.quantization.options import Options
from compress.quantization.problem import Problem
from compress.quantization.rate_distortion import Part, entropy, solve_for_price

# Elements of the Grams of all rows up to which groups are solved at once. A group of few rows, as in a depthwise
# convolution, costs as many steps as a whole layer of its columns.
APART = 1 << 23


def layer_moments(
    layer: Layer, quantized: Sequence[Tensor], analog: Sequence[Tensor], options: Options, name: str
) -> Moments | None:
    """Moments of the inputs of a float `layer` in both networks, a tensor for each batch; None: nothing reads them."""
    if not bool(torch.isfinite(layer.weight).all()):
        raise UserError(f"{name}: found a weight with values that are not finite")
    if not (options.solver.reads_inputs or options.correction.bias or options.grid.scale == "mse"):
        return None
    return options.grams.moments(layer, quantized, analog, centre=options.correction.bias)


@torch.no_grad()
def solve_layer(
    layer: Layer, moments: Moments | None, bits: int, options: Options, name: str
) -> tuple[Tensor, Grid, Tensor | None]:
    """(codes in the weight's shape, grid of its N channels, bias (N,) or None where there was none and none is needed).

    `moments` may be None where nothing reads them, see `layer_moments`. With `correction.bias`, bias += W mu - Q mu~,
    with mu and mu~ the mean analog and quantized inputs; the moments are centred then. A weight that is exactly zero
    was pruned and stays zero. Raises UserError, naming the layer, where its inputs are not finite.
    """
    weight, levels = layer.weight.detach().flatten(1), options.grid.levels(bits)
    unread = weight.new_empty(0, 0)
    if moments is None:
        grid = options.grid.choose(weight, levels)
        return options.solver(Problem(weight, unread, unread, grid)).reshape(layer.weight.shape), grid, layer.bias
    grid = options.grid.choose(weight, levels, _importance(weight, moments, _diagonal(moments, name)))
    if options.solver.reads_inputs:
        codes, grid = _solve_groups(weight, moments, grid, options)
    else:
        codes = options.solver(Problem(weight, unread, unread, grid))
    bias = corrected_bias(layer, grid.dequantize(codes), moments) if options.correction.bias else layer.bias
    return codes.reshape(layer.weight.shape), grid, bias


@torch.no_grad()
def solve_layer_for_price(
    layer: Layer,
    moments: Moments,
    price: float,
    options: Options,
    name: str,
    revise: Callable[[float], float],
    coupling: Tensor | None = None,
) -> tuple[Tensor, Grid, Tensor | None, float]:
    """As `solve_layer`, with one step for the whole layer and coded bits of that `price`; and the bits of all codes.

    price: the output error, over all patches, that a bit is worth. revise: what that is from half of the passes on,
    from the bits of all codes. coupling: that of the rows of each group, (groups, N / groups, N / groups), see
    `compress.quantization.rate_distortion.Part`.
    """
    _diagonal(moments, name)
    weight = layer.weight.detach().flatten(1)
    live = slice(None) if moments.live is None else moments.live
    mask = weight != 0
    pruned = not bool(mask.all())
    together = None if coupling is None else torch.block_diag(*coupling)
    slices, parts = [], []
    for gram, cross, rows in _parts(weight, moments, apart=True):
        between = None if together is None else together[rows, rows]
        part = Part(weight[rows, live], gram, cross, mask[rows, live] if pruned else None, between)
        slices.append(rows)
        parts.append(part)
    # The ridge adds to the error of every weight, which is worth no bits: on other images there is none of it. And the
    # Grams may be of a part of the patches only.
    unit = (1 + moments.grown_ridge) * moments.count / moments.seen
    sweeps, survivors = options.refinement.sweeps, options.refinement.survivors
    unseen = weight.new_zeros(weight.numel() - sum(part.weight.numel() for part in parts))

    def revised(codes: Sequence[Tensor]) -> float:
        return unit * revise(entropy([*codes, unseen] if len(unseen) else codes))

    answers, step = solve_for_price(parts, unit * price, sweeps, survivors=survivors, revise=revised)
    codes = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
    for rows, answer in zip(slices, answers, strict=True):
        codes[rows, live] = answer.to(torch.int32)
    grid, codes = spanning(codes, step, weight.dtype)
    bias = corrected_bias(layer, grid.dequantize(codes), moments) if options.correction.bias else layer.bias
    return codes.reshape(layer.weight.shape), grid, bias, entropy([codes.float()])


@torch.no_grad()
def corrected_bias(layer: Layer, quantized: Tensor, moments: Moments) -> Tensor:
    """The bias (N,) of a float `layer` plus W mu - Q mu~, for the values `quantized` (N, ...) of its weight."""
    weight = layer.weight.detach().flatten(1)
    change = _mean_error(weight, quantized.flatten(1), moments).to(weight.dtype)
    return change if layer.bias is None else change + layer.bias


def _diagonal(moments: Moments, name: str) -> Tensor:
    """The mean squares (groups, d) of the inputs. Raises UserError where one is not finite."""
    gram, _, _, mean_analog = moments.finished
    diagonal = gram.diagonal(dim1=1, dim2=2)
    if not bool(torch.isfinite(diagonal).all() and torch.isfinite(mean_analog).all()):
        raise UserError(f"{name}: found inputs that are not finite on the calibration images")
    return diagonal


def _importance(weight: Tensor, moments: Moments, diagonal: Tensor) -> Tensor:
    """Mean square of each input, (d,) or (N, d), from the diagonals (groups, live d) of the Grams."""
    groups = diagonal.shape[0]
    importance = diagonal[0] if groups == 1 else diagonal.repeat_interleave(weight.shape[0] // groups, 0)
    if moments.live is None:
        return importance
    return importance.new_zeros(*importance.shape[:-1], weight.shape[1]).index_copy(-1, moments.live, importance)


def _solve_groups(weight: Tensor, moments: Moments, grid: Grid, options: Options) -> tuple[Tensor, Grid]:
    """Codes (N, d) and their grid; the groups of a convolution are problems of their own."""
    shared, refinement = options.grid.granularity == "layer", options.refinement
    live = slice(None) if moments.live is None else moments.live
    parts = _parts(weight, moments, options.solver.rows_apart)
    if shared and len(parts) > 1:
        # Each group would choose a scale of its own.
        refinement = replace(refinement, scale_candidates=1, refit=False)
    # Columns that only ever meet padding take zero, whatever the solver.
    codes, scales = grid.quantize(torch.zeros_like(weight)), grid.scale.clone()
    unpruned = weight != 0
    pruned = not bool(unpruned.all())
    for gram, cross, rows in parts:
        mask = unpruned[rows, live] if pruned else None
        problem = Problem(weight[rows, live], gram, cross, grid.rows(rows), mask)
        solved, chosen = refinement(options.solver, problem, shared)
        codes[rows, live], scales[rows] = solved, chosen.scale
    return codes, Grid(scales, grid.zero_point, grid.levels)


def _parts(weight: Tensor, moments: Moments, apart: bool) -> list[tuple[Tensor, Tensor, slice]]:
    """(gram, cross, rows) of each group; with `apart`, all in one where a Gram for each row takes little memory."""
    gram, cross, _, _ = moments.finished
    groups, depth = gram.shape[:2]
    if groups == 1 or not apart or weight.shape[0] * depth**2 > APART:
        return list(zip(gram, cross, _rows(weight, groups), strict=True))
    size = weight.shape[0] // groups
    each = gram.repeat_interleave(size, 0)
    return [(each, each if cross is gram else cross.repeat_interleave(size, 0), slice(None))]


def _mean_error(weight: Tensor, quantized: Tensor, moments: Moments) -> Tensor:
    """W mu - Q mu~, (N,), for the values `quantized` (N, d)."""
    gram, _, mean_quantized, mean_analog = moments.finished
    live = slice(None) if moments.live is None else moments.live
    values, analog = quantized[:, live].to(gram.dtype), weight[:, live].to(gram.dtype)
    change = [
        analog[rows] @ mean_analog[group] - values[rows] @ mean_quantized[group]
        for group, rows in enumerate(_rows(weight, gram.shape[0]))
    ]
    return torch.cat(change)


def _rows(weight: Tensor, groups: int) -> list[slice]:
    size = weight.shape[0] // groups
    return [slice(group * size, (group + 1) * size) for group in range(groups)]
