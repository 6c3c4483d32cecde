"""A budget of bytes for a file."""

import re

from compress.errors import UserError

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20}


def budget_bytes(budget: str | float, float_bytes: int) -> int:
    """The bytes of 500000, "500kB", "0.5MB", "1MiB", or of "8x": an eighth of the float32 file's `float_bytes`.

    Raises UserError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(budget))
    number, unit = (float(match[1]), match[2] or "B") if match else (0.0, "")
    if unit == "x" and number >= 1:
        return int(float_bytes / number)
    if unit in UNITS and number * UNITS[unit] >= 1:
        return int(number * UNITS[unit])
    raise UserError(f"budget: found {budget!r}; accepted: a size such as 500kB, 0.5MB or 1MiB, or a ratio such as 8x")
