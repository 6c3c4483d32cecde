"""Fewer weights: masks that keep single weights at zero (magnitude, N:M), or layers with fewer channels (structured).

A recipe is a frozen dataclass, one Python file and one YAML file. What the run asks of it is `shrink`, before training,
and `masks`, whenever the callback of `compress.training.pruning` says so; see `compress.pruning.recipe`.
"""
