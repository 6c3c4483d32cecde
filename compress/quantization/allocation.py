"""Which width each layer gets: an integer program over what each width costs and how many bytes it takes."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """For each layer the index of one of its choices, so that the sizes sum to at most `budget` at the least cost.

    costs and sizes: a sequence of choices per layer, of any length from 1, the same in both. None where even the
    smallest choices are too large. The solution is optimal: a multiple-choice knapsack, solved by branch and bound
    (`scipy.optimize.milp`).
    """
    if sum(min(own) for own in sizes) > budget:
        return None
    layer_of = np.repeat(np.arange(len(sizes)), [len(own) for own in sizes])
    cost = np.concatenate([np.asarray(own, float) for own in costs])
    size = np.concatenate([np.asarray(own, float) for own in sizes])
    # Fractions of the whole, because the solver's tolerances are absolute.
    cost = cost / max(cost.max(), np.finfo(float).tiny)
    one_each = csr_array((np.ones(len(cost)), (layer_of, np.arange(len(cost)))))
    found = milp(
        cost,
        integrality=np.ones(len(cost)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(size[None] / budget, ub=1),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"the integer program of {len(sizes)} layers was not solved: {found.message}")
    starts = np.concatenate([[0], np.cumsum([len(own) for own in sizes])])
    chosen = [int(np.argmax(found.x[start:stop])) for start, stop in pairwise(starts)]
    # The solver may overstep by its tolerance; the budget may not.
    if sum(own[index] for own, index in zip(sizes, chosen, strict=True)) > budget:
        return allocate(costs, sizes, budget - max(1, budget // 10**6))
    return chosen
