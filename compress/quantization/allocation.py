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
    if sum(map(min, sizes)) > budget:
        return None
    layer_of = np.repeat(np.arange(len(sizes)), [len(choices) for choices in sizes])
    cost = np.concatenate([np.asarray(choices, float) for choices in costs])
    size = np.concatenate([np.asarray(choices, float) for choices in sizes])
    # Shares of the largest cost, because the solver's tolerances are absolute.
    cost = cost / max(cost.max(), np.finfo(float).tiny)
    one_choice = csr_array((np.ones(len(cost)), (layer_of, np.arange(len(cost)))))
    solution = milp(
        cost,
        integrality=np.ones(len(cost)),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_choice, 1, 1), LinearConstraint(size[None] / budget, ub=1)],
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise RuntimeError(f"the integer program of {len(sizes)} layers was not solved: {solution.message}")
    starts = np.concatenate([[0], np.cumsum([len(choices) for choices in sizes])])
    chosen = [int(np.argmax(solution.x[start:stop])) for start, stop in pairwise(starts)]
    # The solver may overstep by its tolerance; the budget may not.
    if sum(choices[index] for choices, index in zip(sizes, chosen, strict=True)) > budget:
        return allocate(costs, sizes, budget - max(1, budget // 10**6))
    return chosen
