"""placeholder until merged"""

from collections.abc import Mapping
from typing import Any

from compress.building import build


class DataSets:
    def module(self, node: Mapping[str, Any], *, seed: int, device: Any, batch_size: int | None = None) -> Any:
        node = dict(node) | ({} if batch_size is None else {"batch_size": batch_size})
        module = build(node, seed=seed, device=device)
        module.prepare_data()
        module.setup()
        return module
