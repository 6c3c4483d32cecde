"""What processes that train together compute together."""

import torch
from torch import Tensor


def mean_of_processes(values: Tensor) -> Tensor:
    """The mean of `values` over the processes that train together, in each of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()
