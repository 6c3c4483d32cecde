"""`--verify RUN`: whether the files of a finished run are what it left, and its models as accurate as it says."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from compress.checksums import digest, file_digest, read_text
from compress.config.recorded import read_config
from compress.config.values import check_values
from compress.data.shared import DataSets
from compress.errors import UserError
from compress.evaluation import evaluate
from compress.export.formats import exporter_of, read_back
from compress.models.inference import full_float32
from compress.pipeline.parts import Parts
from compress.pipeline.variants import on_cpu
from compress.progress import console
from compress.results.record import FILE, Record
from compress.results.tradeoff import Row

CONFIG = "config.yaml"
# Processors round differently: so many images, or such a share of them, may fall into another class.
IMAGES, SHARE = 2, 1e-3


def verify(directory: Path, allowed: Collection[str] = ()) -> int:
    """Prints for each file of the run in `directory` whether it holds; 0 where all do, otherwise 1.

    Every file but `run.log`, what other libraries said, is read again, and every model evaluated on the validation and
    test images of the run, or of its stage; nothing is written. allowed: names of code that were typed for its
    configuration, see `compress.config.received`. Raises UserError where there is no finished run, and
    where its data cannot be read.
    """
    if not (directory / FILE).exists():
        raise UserError(f"--verify: found no {directory / FILE}; accepted: the directory of a finished run")
    holds = _Verification(directory, DataSets(), allowed).holds()
    console.print(f"{directory}: {'everything holds' if holds else 'not everything holds'}", style="bold", markup=False)
    return 0 if holds else 1


class _Verification:
    def __init__(self, directory: Path, data_sets: DataSets, allowed: Collection[str]) -> None:
        self.directory, self.data_sets, self.allowed = directory, data_sets, allowed
        self.verdicts: list[bool] = []

    def holds(self) -> bool:
        try:
            record = Record.read(self.directory / FILE)
        except UserError as damage:
            self._say(FILE, [str(damage)])
            return False
        self._say(FILE, [], f"its checksum{'' if record.files else ', and names none of other files'}")
        parts = self._parts(record)
        models = {row.file: row for row in record.rows if row.file}
        for name in record.files:
            if name not in models and name != CONFIG:
                self._say(name, self._changed(name, record), "bytes")
        for stage in record.stages:
            self.verdicts.append(_Verification(self.directory / stage.directory, self.data_sets, self.allowed).holds())
        if not record.stages:
            for row in models.values():
                self._model(row, record, parts)
        return all(self.verdicts)

    def _say(self, name: str, problems: Sequence[str], held: str = "") -> None:
        """Prints the verdict on the file `name`."""
        self.verdicts.append(not problems)
        word, style = ("damaged", "red") if problems else ("holds", "green")
        console.print(f"{word:8}", style=style, end="")
        console.print(f"{self.directory / name}: {'; '.join(problems) or held}", markup=False)

    def _changed(self, name: str, record: Record) -> list[str]:
        """What is wrong with the bytes of a file."""
        path = self.directory / name
        if not path.is_file():
            return ["found no such file"]
        # A run of before there were checksums names none.
        changed = name in record.files and file_digest(path) != record.files[name]
        return ["found other bytes than those that the run left"] if changed else []

    def _parts(self, record: Record) -> Parts | None:
        """What `config.yaml` describes; None where it is damaged, or a part that scripts/quantize.py left."""
        problems = self._changed(CONFIG, record)
        if record.student.checkpoint is not None:
            self._say(CONFIG, problems, "bytes")
            return None
        if not problems and record.configuration and digest(read_text(self.directory / CONFIG)) != record.configuration:
            problems = ["found another configuration than that of the results"]
        self._say(CONFIG, problems, "bytes and hash")
        if problems:
            return None
        config = read_config(self.directory, self.allowed)
        check_values(config)
        return Parts(config, self.data_sets)

    def _model(self, row: Row, record: Record, parts: Parts | None) -> None:
        """The file of a `row`: its bytes, what it says of its origin, and its accuracy on the data of `parts`."""
        path, problems = self.directory / row.file, self._changed(row.file, record)
        if not problems and path.stat().st_size != row.bytes:
            problems.append(f"found {path.stat().st_size} bytes where the run has {row.bytes}")
        if not problems and record.student.checkpoint is not None:
            self._say(row.file, [], "bytes; not evaluated, because scripts/quantize.py leaves no whole configuration")
            return
        if problems or parts is None:
            self._say(row.file, problems or [f"not evaluated, because {CONFIG} does not hold"])
            return
        if parts.is_given("student"):
            self._say(row.file, [], "bytes; not evaluated, because its network was given from Python")
            return
        exporter, own_network = exporter_of(path), parts.own_network(record.student.network)
        try:
            model, about = read_back(exporter, path, 1, own_network)
        except UserError as damage:
            self._say(row.file, [str(damage)])
            return
        problems += _origin_problems(about.get("extra") or {}, record)
        data, accuracies = parts.data, {}
        placed = model.to(data.device) if exporter.movable else on_cpu(model)
        with full_float32():
            for split, loader, stated in (
                ("validation", data.val_dataloader(), row.validation_accuracy),
                ("test", data.test_dataloader(), row.test_accuracy),
            ):
                if stated is None:  # the images have no labels
                    continue
                accuracies[split] = evaluate(placed, loader, data.num_classes).accuracy
                images = record.data.images[split]
                if abs(accuracies[split] - stated) > max(IMAGES / images, SHARE) * (1 + 1e-9):
                    problems.append(
                        f"found an accuracy of {100 * accuracies[split]:.2f} % on {split} images where the run has "
                        f"{100 * stated:.2f} %"
                    )
        printed = ", ".join(f"{100 * accuracy:.2f} % on {split}" for split, accuracy in accuracies.items())
        self._say(row.file, problems, f"bytes, hashes and accuracy ({printed})")


def _origin_problems(extra: dict[str, Any], record: Record) -> list[str]:
    """Where a model file says that it comes from another run than its record."""
    stated = {
        "configuration": (extra.get("configuration"), record.configuration),
        "seed": (extra.get("seed"), record.seed),
        "commit": (extra.get("versions", {}).get("commit"), record.versions.get("commit")),
    }
    return [
        f"found the {name} {found} where the run has {wanted}"
        for name, (found, wanted) in stated.items()
        if found != wanted and record.configuration
    ]
