"""Decoupled knowledge distillation: trained like `kd`; what differs is the loss that its YAML chooses."""

from compress.methods.kd import KD


class DKD(KD):
    """`method=dkd`: see `compress.losses.dkd` for what is minimised."""
