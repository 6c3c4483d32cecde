"""Whether Weights & Biases can be reached with an account, which it asks for only after everything has been built."""

import os
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from compress.errors import UserError


def check_account(offline: bool) -> None:
    """Raises UserError where runs are to be uploaded and there is no API key."""
    offline = offline or os.environ.get("WANDB_MODE") in ("offline", "disabled")
    if not offline and not _has_key():
        raise UserError(
            "logger: found wandb without an API key; accepted: logger.wandb.offline=true, WANDB_API_KEY or wandb login"
        )


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc(os.environ.get("NETRC", Path.home() / ".netrc")).authenticators(host or "") is not None
    except (OSError, NetrcParseError):
        return False
