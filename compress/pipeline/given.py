"""Networks that `compress.run` is given in place of the stems of `student` and `teacher`."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from compress.config.compose import key_of
from compress.config.recorded import read_config
from compress.errors import UserError
from compress.models import own_class

# Where the configuration describes the network of a role.
NODES = {"student": "student", "teacher": "teacher.model"}


def overrides_for(networks: Mapping[str, nn.Module], overrides: Sequence[str]) -> list[str]:
    """What composes the nodes of `networks`. Raises UserError for what is no network, and beside a typed stem."""
    composed = []
    for role, network in networks.items():
        if not isinstance(network, nn.Module):
            raise UserError(f"{role}: found a {type(network).__name__}; accepted: a torch.nn.Module, or {role}=STEM")
        typed = next((override for override in overrides if key_of(override) == role), None)
        if typed is not None:
            raise UserError(f"{role}: found {typed!r} beside a network from Python; accepted: one of the two")
        node, name = NODES[role], own_class.class_name(network)
        composed += [f"{role}={own_class.STEM}", f"{node}.target='{name}'", f"{node}.from_python=true"]
    return composed


def check_given(directory: Path, networks: Mapping[str, nn.Module], allowed: Collection[str] = ()) -> None:
    """Raises UserError where the run in `directory` was given other networks than `networks` are."""
    config = read_config(directory, allowed)
    for role, key in NODES.items():
        node: Any = OmegaConf.select(config, key) or {}
        wanted = node.get("target") if node.get("from_python") else None
        found = own_class.class_name(networks[role]) if role in networks else None
        if found != wanted:
            accepted = "no network" if wanted is None else f"a network of the class {wanted}, {role}=NETWORK"
            raise UserError(f"{role}: found {found or 'no network'} for the run in {directory}; accepted: {accepted}")
