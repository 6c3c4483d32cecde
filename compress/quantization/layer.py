"""Quantizing one layer: its grid, its codes and its corrected bias, from the moments of its inputs."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.quantization.grid import Grid
from compress.quantization.patches import Moments
from compress.quantization.refinement import Refinement


@torch.no_grad()
def solve_layer(
    layer: nn.Conv2d | nn.Linear,
    moments: Moments | None,
    *,
    name: str,
    levels: int,
    choose: Callable[[Tensor, int, Tensor | None], Grid],
    solver: Callable[..., Tensor],
    reads_inputs: bool,
    bias_correction: bool,
    refine: Refinement | None = None,
) -> tuple[Tensor, Grid, Tensor | None]:
    """(codes in the weight's shape, grid of its N channels, bias (N,) or None where there was none and none is needed).

    `choose(weight (N, d), levels, importance)` gives the grid, importance being the diagonal of the Gram. `solver` is
    called once per group; `refine` is what becomes of its answer. With `bias_correction`, bias += W mu - Q mu~, with mu
    and mu~ the mean analog and quantized inputs; the moments are centred then. `moments` may be None where nothing
    reads them. A weight that is exactly zero was pruned and stays zero. Raises UserError, naming the layer, where its
    inputs are not finite.
    """
    weight = layer.weight.detach().flatten(1)
    if moments is None:
        grid = choose(weight, levels, None)
        return solver(weight, None, None, grid).reshape(layer.weight.shape), grid, layer.bias
    gram, cross, mean_quantized, mean_analog = moments.finish()
    if not bool(torch.isfinite(gram.diagonal(dim1=1, dim2=2)).all() and torch.isfinite(mean_analog).all()):
        raise UserError(f"{name}: found inputs that are not finite on the calibration images")
    live = slice(None) if moments.live is None else moments.live
    groups = gram.shape[0]
    per_group = weight.shape[0] // groups
    diagonal = gram.diagonal(dim1=1, dim2=2)
    importance = diagonal[0] if groups == 1 else diagonal.repeat_interleave(per_group, 0)
    if moments.live is not None:
        importance = importance.new_zeros(*importance.shape[:-1], weight.shape[1]).index_copy(-1, live, importance)
    grid = choose(weight, levels, importance)

    if reads_inputs:
        # Columns that only ever meet padding take zero, whatever the solver.
        codes = grid.quantize(torch.zeros_like(weight))
        scales = grid.scale.clone()
        refine = refine or Refinement()
        if refine.shared and groups > 1:
            # Groups are solved one by one, and each would choose a scale of its own.
            refine = replace(refine, candidates=1, refit=False)
        kept = weight != 0
        pruned = not bool(kept.all())
        for group in range(groups):
            rows = slice(group * per_group, (group + 1) * per_group)
            mask = kept[rows, live] if pruned else None
            solved, own = refine(solver, weight[rows, live], gram[group], cross[group], grid.rows(rows), mask)
            codes[rows, live], scales[rows] = solved, own.scale
        grid = Grid(scales, grid.zero_point, levels)
    else:
        codes = solver(weight, None, None, grid)

    bias = layer.bias
    if bias_correction:
        change = []
        values = grid.dequantize(codes)[:, live].to(gram.dtype)
        analog = weight[:, live].to(gram.dtype)
        for group in range(groups):
            rows = slice(group * per_group, (group + 1) * per_group)
            change.append(analog[rows] @ mean_analog[group] - values[rows] @ mean_quantized[group])
        bias = torch.cat(change).to(weight.dtype) + (0 if bias is None else bias)
    return codes.reshape(layer.weight.shape), grid, bias
