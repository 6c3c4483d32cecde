"""What the project that this one replaces reported of its grid, to stand beside ours.

CIFAR-10, a ResNet-18 student of a ResNet-50 teacher, weights by GPFQ with an alphabet of 2^b + 1 levels; test accuracy
in %. It chose checkpoints and scales on the test set, and its KD, DML and DKD had mistakes that are not repeated
here, so that its figures are no target. Where it had several runs there is the lowest and the highest. Of CIFAR-100
no figures are known.
"""

# By experiment, method (its word on the command line) and bits of the weights, 32 for the float student.
FIGURES: dict[str, dict[str, dict[int, tuple[float, ...]]]] = {
    "capstone_cifar10": {
        "kd_mixup": {32: (95.77,), 8: (95.45,), 4: (94.20, 94.66), 3: (92.47, 92.63), 2: (87.5, 88.1)},
        "kd": {32: (90.77,), 8: (89.69,), 4: (86.47,), 3: (82.40,), 2: (71.87,)},
        "dml": {32: (92.89,), 8: (92.54,), 4: (90.45,), 3: (86.98,), 2: (82.39,)},
        "dkd": {32: (89.95,), 8: (84.39,), 4: (77.69,), 3: (69.69,), 2: (61.06,)},
    },
    "capstone_cifar100": {},
}
