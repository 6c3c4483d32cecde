"""A budget of bytes for a file."""

import re
from dataclasses import dataclass

from compress.errors import UserError

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20}


@dataclass(frozen=True)
class Budget:
    """Bytes that a file may have: a number of them, or the float32 file's divided by `ratio`."""

    size: int | None = None
    ratio: float | None = None

    @classmethod
    def parse(cls, text: str | float) -> "Budget":
        """Reads 500000, "500kB", "0.5MB", "1MiB" or "8x". Raises UserError for anything else."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(text))
        number, unit = (float(match[1]), match[2] or "B") if match else (0.0, "")
        if unit == "x" and number >= 1:
            return cls(ratio=number)
        if unit in UNITS and number * UNITS[unit] >= 1:
            return cls(size=int(number * UNITS[unit]))
        raise UserError(f"budget: found {text!r}; accepted: a size such as 500kB, 0.5MB or 1MiB, or a ratio such as 8x")

    def bytes(self, float_bytes: int) -> int:
        """The number of bytes, where the float32 file has `float_bytes`."""
        return self.size if self.ratio is None else int(float_bytes / self.ratio)
