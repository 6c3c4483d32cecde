"""What an export format is: a subclass of `Exporter`, in one Python file and one YAML file in `conf/export`."""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from compress.errors import UserError
from compress.export.description import NetworkDescription
from compress.quantization import QuantizedModel, Quantizer


class Exporter(ABC):
    """A format of model files.

    A subclass is a frozen dataclass; its fields, which have defaults, are the keys that its YAML node may have.

    suffix: the end of a file's name, such as ".onnx", by which `compress.predict` knows the format of a file.
    runtime: what runs the file, for the column `runtime` and, unless it is torch, for the name of the row.
    packages: the modules that have to be installed, and `extra` the optional extra of this project that has them.
    loading: lines of Python, for a model card, that run the file `{file}` on the normalised `images`, a NumPy array.
    movable: whether `read` gives a module that `.to(device)` moves. Any other model gets its images on the CPU.
    takes_network: whether `read` takes, as `network`, a network or class of the user's own in place of the stem that a
    file names, see `compress.models.rebuild`.

    The formats of a run differ in suffix and runtime. The module of a format imports its packages late, so that it can
    be imported where they are not installed.
    """

    suffix: ClassVar[str]
    runtime: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    loading: ClassVar[str] = ""
    movable: ClassVar[bool] = False
    takes_network: ClassVar[bool] = False

    def check(self, quantizer: Quantizer | None) -> None:
        """Raises UserError, before any work, where a package is missing.

        A format with limits extends this by what it cannot hold of the networks that `quantizer` makes; without a
        quantizer there are only float ones.
        """
        self.require_packages()

    @abstractmethod
    def write(
        self,
        path: Path,
        network: nn.Module | QuantizedModel,
        description: NetworkDescription,
        calibration_batches: Iterable[Tensor] = (),
    ) -> None:
        """Writes a float or a quantized `network`, and what `read` needs to give the description again.

        calibration_batches: normalised images `(B, 3, H, W)`, for what a format wants to measure. The file gets its
        name only when it is complete (see `compress.files.write_atomically`).
        """

    @abstractmethod
    def read(self, path: Path, threads: int = 1) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
        """(model, description) of a file that `write` made.

        The model, a function or a module in eval mode, takes normalised images `(B, 3, H, W)` and gives logits.
        threads: those that the runtime may use; torch keeps its own number. The description has the keys of
        `NetworkDescription`. Raises UserError, naming the file, where it is missing, damaged or foreign.
        """

    def companions(self, path: Path) -> list[Path]:
        """The other files that `write` made for the file `path`, which `read` needs beside it."""
        return []

    def read_for_latency(self, path: Path) -> Callable[[Tensor], Tensor]:
        """The model on one thread, as its runtime is fastest, where `read` has it as exact as it can be."""
        return self.read(path, threads=1)[0]

    def about(self) -> dict[str, str]:
        """What the record of a run says of the runtime, see `compress.results.record.Runtime`."""
        try:
            return {"version": version(self.runtime)}
        except PackageNotFoundError:
            return {}

    def require_packages(self) -> None:
        """Raises UserError, naming the extra, where one of `packages` is not installed."""
        for package in self.packages:
            import_package(package, self.extra)


def import_package(package: str, extra: str | None) -> Any:
    """The module of that name. Raises UserError, saying what to install, where it is missing."""
    try:
        return __import__(package)
    except ImportError:
        wanted = package if extra is None else f"'compress[{extra}]'"
        raise UserError(f"{package} is not installed; pip install {wanted}") from None


@contextmanager
def silent_descriptor() -> Iterator[None]:
    """Nothing that is written to the standard error of this process arrives there."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
