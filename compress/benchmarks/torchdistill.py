"""torchdistill's loop as a way of `python scripts/benchmark.py step`: its boxes, its losses and its meters.

The settings are those of its samples for CIFAR-10 (`configs/sample/cifar10/kd`), the loop is that of its example for
image classification (`examples/torchvision/image_classification.py`). It is no dependency of the project.
"""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler

LOG_EVERY = 100  # steps, as in its samples


def installed() -> bool:
    return find_spec("torchdistill") is not None


def distillation_box(
    teacher: nn.Module,
    student: nn.Module,
    pictures: Dataset[tuple[Tensor, int]],
    device: torch.device,
    loader: dict[str, Any],
    optimizer: dict[str, Any],
) -> Any:
    """What torchdistill calls the two networks, the data, the loss and the optimizer together.

    `loader` are arguments of a `DataLoader`, `optimizer` those of `torch.optim.SGD`.
    """
    from torchdistill.core.distillation import get_distillation_box

    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    divergence = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": 4.0,
            "alpha": 0.9,
            "reduction": "batchmean",
        },
    }
    settings = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": loader,
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": optimizer},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": divergence, "weight": 1.0}}},
        },
    }
    return get_distillation_box(teacher, student, {"train": pictures}, settings, device, None, False, 1)


def train(box: Any, device: torch.device) -> None:
    """An epoch, with the loss of every step read, as its example has it for its meters."""
    from torchdistill.misc.log import MetricLogger

    box.pre_epoch_process(epoch=0)
    meters = MetricLogger(delimiter="  ")
    for images, target, extra in meters.log_every(box.train_data_loader, LOG_EVERY, ""):
        loss = box.forward_process(images.to(device), target.to(device), extra)
        box.post_forward_process(loss=loss)
        meters.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
