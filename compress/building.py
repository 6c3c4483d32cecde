"""Building a part from its node of the configuration."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate


def build(node: Mapping[str, Any], **supplied: Any) -> Any:
    """What the `_target_` of `node` gives for its other keys and what is `supplied`.

    The `stem`, the word that chose the option, is no argument.
    """
    return instantiate({key: value for key, value in node.items() if key != "stem"}, **supplied)
