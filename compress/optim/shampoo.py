"""Shampoo: gradients preconditioned by inverse roots of one second-moment matrix per side.

Gupta, Koren & Singer 2018, https://arxiv.org/abs/1802.09568; grafting from Anil et al. 2020,
https://arxiv.org/abs/2002.09018; blocks and decoupled decay from Shi et al. 2023, https://arxiv.org/abs/2309.06497
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from compress.arguments import BelowOne, Count, NotNegative, Positive, annotations, check_arguments
from compress.optim.kronecker import fold, inverse_root, join, split

CACHED = 2**20  # weights
SIDES = ("left", "right")


class Shampoo(Optimizer):
    """`W <- (1 - lr * weight_decay) W - lr * M`, `M <- momentum * M + s L^(-1/2k) G R^(-1/2k)` for each parameter W.

    G is the gradient folded to `(m, n)`, k = 2; `L` `(m, m)` gathers `G G^T` and `R` `(n, n)` gathers `G^T G`. Sides
    longer than `block_size` are cut, and every block `(r, c)` has its `L` `(r, r)` and `R` `(c, c)`. s
    gives the direction of a parameter, all blocks together, the length of the step of the grafting optimizer. Vectors,
    such as biases and the weights of norms, take that step itself, and without grafting `L^(-1/2) g` (k = 1).

    Parameters, all of which a parameter group may set differently:
    - `lr`: under `grafting=adam` about `1 - momentum` of Adam's rate, under `sgd` that of SGD.
    - `momentum`: of the preconditioned step, as PyTorch's SGD has it.
    - `beta2`: 1 sums the statistics over all steps (Gupta 2018); below 1 they are a moving average, without the bias
      of its start (Anil 2020).
    - `weight_decay`: decoupled (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101).
    - `grafting`: `adam` for `G / (sqrt(V) + grafting_epsilon)`, `V` of G's shape being the average of its squares with
      `grafting_beta2`; `sgd` for G; `none` for s = 1.
    - `damping`: added to the eigenvalues of a factor, as a fraction of the largest (Anil 2020); float32 statistics
      know an eigenvalue to about 1e-7 of the largest.
    - `root_interval`: steps between two roots. While the first interval lasts they follow steps 1, 2, 4, 8 and so on,
      because the statistics of few gradients say nothing about most directions.
    - `statistics_interval`: every how many steps, from the first, a gradient enters the factors.

    The state consists of tensors: `step` `()`, `momentum_buffer` and `second_moment` of the parameter's shape, and for
    the i-th shape of block `left_i`, `left_root_i` `(b, r, r)`, `right_i` and `right_root_i` `(b, c, c)`. It is
    float64 for parameters in float64 and float32 for all others, also after loading.

    Raises UserError for arguments out of range, RuntimeError in `step` for sparse gradients and for complex ones.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Positive = 5e-4,
        momentum: BelowOne = 0.9,
        beta2: Annotated[float, Field(gt=0, le=1)] = 0.95,
        weight_decay: NotNegative = 0.0,
        grafting: Literal["none", "sgd", "adam"] = "adam",
        grafting_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999,
        grafting_epsilon: Positive = 1e-8,
        damping: Positive = 1e-4,
        block_size: Count = 256,
        root_interval: Count = 50,
        statistics_interval: Count = 1,
    ) -> None:
        given = locals()
        super().__init__(params, {name: given[name] for name in annotations(Shampoo) if name != "params"})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_arguments(Shampoo, {name: param_group.get(name, value) for name, value in self.defaults.items()}, "")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As usual, but the state keeps its precision, which PyTorch would lower to that of the parameters."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    like = {} if name == "step" else {"device": parameter.device, "dtype": _precision(parameter)}
                    self.state[parameter][name] = value.to(**like, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; `closure` computes them anew and returns the loss."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            # Parameters without a gradient in some step fall behind the others.
            alike: dict[int, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if parameter.grad.layout != torch.strided or parameter.is_complex():
                        raise RuntimeError(
                            f"Shampoo takes dense, real gradients; found {parameter.grad.layout}, {parameter.dtype} "
                            f"for a parameter of shape {tuple(parameter.shape)}"
                        )
                    state = self.state[parameter] or self._start(parameter, group)
                    state["step"] += 1
                    alike[int(state["step"])].append(parameter)
            for count, parameters in alike.items():
                for portion in _portions(parameters):
                    self._move(portion, group, count)
        return loss

    def _start(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        zeros = partial(torch.zeros, dtype=_precision(parameter), device=parameter.device)
        state: dict[str, Tensor] = self.state[parameter]
        state["step"] = torch.tensor(0)
        if group["momentum"]:
            state["momentum_buffer"] = zeros(parameter.shape)
        if group["grafting"] == "adam":
            state["second_moment"] = zeros(parameter.shape)
        rows, columns, order = fold(parameter.shape)
        if order == 2 or group["grafting"] == "none":
            for place, block in enumerate(split(torch.empty(rows, columns, device="meta"), group["block_size"])):
                for side, length in list(zip(SIDES, block.shape[1:], strict=True))[:order]:
                    state[f"{side}_{place}"] = zeros(len(block), length, length)
                    state[f"{side}_root_{place}"] = zeros(len(block), length, length)
        return state

    def _move(self, parameters: list[Tensor], group: dict[str, Any], count: int) -> None:
        """Step `count` of `parameters`."""
        states = [self.state[parameter] for parameter in parameters]
        gradients = [p.grad.to(_precision(p)).contiguous() for p in parameters if p.grad is not None]
        steps = gradients
        if group["grafting"] == "adam":
            moments = [state["second_moment"] for state in states]
            weight = _weight(group["grafting_beta2"], count)
            torch._foreach_mul_(moments, 1 - weight)
            torch._foreach_addcmul_(moments, gradients, gradients, value=weight)
            deviations = torch._foreach_sqrt(moments)
            torch._foreach_add_(deviations, group["grafting_epsilon"])
            steps = list(torch._foreach_div(gradients, deviations))
        shaped = [index for index, state in enumerate(states) if "left_0" in state]
        if shaped:
            directions = self._directions([gradients[i] for i in shaped], [states[i] for i in shaped], group, count)
            if group["grafting"] != "none":
                lengths = torch._foreach_norm([steps[index] for index in shaped])
                norms = torch._foreach_norm(directions)
                torch._foreach_clamp_min_(norms, torch.finfo(torch.float32).tiny)
                torch._foreach_mul_(directions, torch._foreach_div(lengths, norms))
            replaced = dict(zip(shaped, directions, strict=True))
            steps = [replaced.get(index, step) for index, step in enumerate(steps)]
        if group["momentum"]:
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            steps = buffers
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, steps, alpha=-group["lr"])

    def _directions(
        self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any], count: int
    ) -> list[Tensor]:
        """`L^(-1/2k) G R^(-1/2k)` in the shapes of `gradients`, blocks of one shape together."""
        size, interval = group["block_size"], group["root_interval"]
        seen_before, skipped = divmod(count - 1, group["statistics_interval"])
        roots_are_due = count % interval == 0 or (count < interval and count.bit_count() == 1)
        folded = [fold(gradient.shape) for gradient in gradients]
        pieces = [split(gradient.view(shape[:2]), size) for gradient, shape in zip(gradients, folded, strict=True)]
        kinds: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        for index, (blocks, (*_, order)) in enumerate(zip(pieces, folded, strict=True)):
            for place, block in enumerate(blocks):
                kinds[order, block.shape[1:], block.dtype, block.device].append((index, place))
        for (order, *_), members in kinds.items():
            counts = [len(pieces[index][place]) for index, place in members]
            gradient = direction = _concatenated([pieces[index][place] for index, place in members])
            for side in SIDES[:order]:
                factors = [states[index][f"{side}_{place}"] for index, place in members]
                roots = [states[index][f"{side}_root_{place}"] for index, place in members]
                if not skipped:
                    seen = gradient @ gradient.mT if side == "left" else gradient.mT @ gradient
                    if group["beta2"] == 1:
                        torch._foreach_add_(factors, seen.split(counts))
                    else:
                        torch._foreach_lerp_(factors, seen.split(counts), _weight(group["beta2"], seen_before + 1))
                if roots_are_due:
                    fresh = inverse_root(_concatenated(factors), 2 * order, group["damping"])
                    torch._foreach_copy_(roots, fresh.split(counts))
                root = _concatenated(roots)
                direction = root @ direction if side == "left" else direction @ root
            for (index, place), part in zip(members, direction.split(counts), strict=True):
                pieces[index][place] = part
        return [
            join(blocks, rows, columns, size).view(gradient.shape)
            for blocks, (rows, columns, _), gradient in zip(pieces, folded, gradients, strict=True)
        ]


def _portions(parameters: list[Tensor]) -> list[list[Tensor]]:
    """What is moved at once: on a CPU about as much as its cache holds, otherwise everything."""
    portions: list[list[Tensor]] = []
    room = 0
    for parameter in parameters:
        if not portions or (parameter.device.type == "cpu" and parameter.numel() > room):
            portions.append([])
            room = CACHED
        portions[-1].append(parameter)
        room -= parameter.numel()
    return portions


def _precision(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _concatenated(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _weight(beta: float, count: int) -> float:
    """Of the newest of `count` values in a moving average from which the bias of its start is taken."""
    return (1 - beta) / (1 - beta**count)
