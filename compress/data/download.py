"""Downloading a file: it gets its name once its sum is checked, and a failure leaves nothing behind."""

import contextlib
import hashlib
import http.client
import urllib.request
from pathlib import Path

from compress.files import write_atomically
from compress.progress import console

TIMEOUT_SECONDS = 15


def download(url: str, md5: str, path: Path) -> None:
    """Fetches `url` to `path`. Raises OSError where that fails or the content has another MD5 sum."""
    try:
        answer = urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS)
    except http.client.HTTPException as failure:
        # What a proxy or a login page answers need not be HTTP; urllib lets that through as it is.
        raise OSError(f"{url} gave no answer in HTTP: {type(failure).__name__}") from None
    with answer:
        console.print(f"downloading {path.name}")
        missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]

        def write(temporary: Path) -> None:
            digest = hashlib.md5(usedforsecurity=False)
            with temporary.open("wb") as stream:
                while chunk := answer.read(1 << 20):
                    digest.update(chunk)
                    stream.write(chunk)
            if digest.hexdigest() != md5:
                raise OSError(f"{url} gave a file with the MD5 sum {digest.hexdigest()}, expected {md5}")

        try:
            write_atomically(path, write)
        except OSError:
            for folder in missing:
                # Another job may have put something there meanwhile.
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
