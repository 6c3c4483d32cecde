"""What data sets of image files share: how large a picture may be, and whether they are held or stay on disk."""

from typing import Annotated, Any, Literal

from pydantic import Field

from compress.data.image_file import accepted_pixels
from compress.data.memory import MEMORY_SHARE, free_bytes
from compress.data.module import BatchOption, Count, DataModule
from compress.progress import console


class FileModule(DataModule):
    """A data set whose `read` gives `Undecoded` images.

    storage: `memory` decodes all images at the start, `disk` leaves them encoded and decodes each batch again in
    `workers` processes (null: one for each core, up to 8; 0: this process), `auto` holds them in memory if they take at
    most MEMORY_SHARE of what is free there. The batches are the same, bit for bit. A picture of more than `max_pixels`
    is refused, see `accepted_pixels`.
    """

    def __init__(
        self,
        *,
        storage: Literal["auto", "memory", "disk"] = "auto",
        workers: BatchOption[Annotated[int, Field(ge=0)] | None] = None,
        max_pixels: Count | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.storage, self.workers, self.max_pixels = storage, workers, accepted_pixels(max_pixels)

    def stays_on_disk(self, decoded_bytes: int) -> bool:
        if self.storage != "auto":
            return self.storage == "disk"
        free = free_bytes(self.device)
        if decoded_bytes <= MEMORY_SHARE * free:
            return False
        console.print(
            f"data: decoded, the images take {decoded_bytes / 1e9:.1f} GB, more than {MEMORY_SHARE:.0%} of the "
            f"{free / 1e9:.1f} GB that are free, so they stay on disk"
        )
        return True
