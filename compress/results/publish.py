"""Publishing a run: its model files and their card in a folder, or in a repository of the Hugging Face Hub."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compress.checksums import file_digest
from compress.errors import UserError, first_line
from compress.export.formats import files_of
from compress.files import check_can_be_made, write_text
from compress.results import card
from compress.results.record import FILE, Record

HUB = "hf:"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def publish(
    run: Path, destination: str, variants: Sequence[str] = (), licence: str | None = None, private: bool = False
) -> tuple[str, list[Path]]:
    """(where it is now, the files) of the `variants` of a finished `run`, with a card of these alone.

    destination: a directory that is new or empty, or `hf:OWNER/NAME`, which is made where it is not there; `private`
    then keeps it from others. variants: names of rows, or of files; without any, all that have files. licence: that of
    the weights, as the Hub names it, such as apache-2.0. Every file is checked against the record of the run before
    anything is written. Raises UserError for what is wrong, and where the Hub cannot be reached or refuses.
    """
    if not (run / FILE).is_file():
        raise UserError(f"{run}: found no {FILE}; accepted: the directory of a finished run")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise UserError(f"--licence: found {licence!r}; accepted: a name of the Hub, such as apache-2.0 or cc-by-4.0")
    record = Record.read(run / FILE)
    files = _chosen(run, record, variants)
    for file in files:
        _check(run, file, record)
    upload = _to_hub if destination.startswith(HUB) else _to_directory
    return upload(run, destination, files, record, licence, private)


def _chosen(run: Path, record: Record, variants: Sequence[str]) -> list[str]:
    """The files of those variants and what these need beside them, relative to the directory of the run."""
    kept = {row.name: row for row in record.rows if row.file}
    if not kept:
        raise UserError(f"{run}: found no model files, for it kept none; accepted: a run with another export")
    names = {**{Path(row.file).name: row for row in kept.values()}, **kept}
    unknown = next((name for name in variants if name not in names), None)
    if unknown is not None:
        raise UserError(f"--variants: found {unknown!r}; accepted: {', '.join(kept)}, or the names of their files")
    chosen = {names[name].file for name in variants or kept}
    files = [Path(row.file) for row in kept.values() if row.file in chosen]
    return [file.as_posix() for path in files for file in files_of(path)]


def _check(run: Path, file: str, record: Record) -> None:
    path = run / file
    if not path.is_file():
        raise UserError(f"{path}: found no such file, which the run left; accepted: the files as the run left them")
    if file_digest(path) != record.files.get(file):
        raise UserError(f"{path}: found content that is not what the run left; accepted: the file as it was written")


def _fill(folder: Path, run: Path, files: Sequence[str], record: Record, licence: str | None) -> list[Path]:
    """Copies the `files` into `folder`, and writes the card of them; what it holds then."""
    placed = {file: Path(file).name for file in files}
    for file, name in placed.items():
        shutil.copyfile(run / file, folder / name)
    renamed = tuple(replace(row, file=placed.get(row.file, "")) for row in record.rows)
    digests = {name: record.files[file] for file, name in placed.items()}
    text = card.model_card(record.model_copy(update={"rows": renamed}), digests, licence)
    write_text(folder / card.FILE, text)
    return [folder / name for name in (card.FILE, *digests)]


def _to_directory(
    run: Path, destination: str, files: Sequence[str], record: Record, licence: str | None, private: bool
) -> tuple[str, list[Path]]:
    if private:
        raise UserError(f"--private: found it for a directory; accepted: --to {HUB}OWNER/NAME")
    directory = Path(destination).resolve()
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise UserError(f"--to: found {directory}, which is not empty; accepted: a new or an empty directory")
    check_can_be_made(directory, "--to")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        filled = _fill(temporary, run, files, record, licence)
        temporary.chmod(0o755)
        temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return destination, [directory / file.name for file in filled]


def _to_hub(
    run: Path, destination: str, files: Sequence[str], record: Record, licence: str | None, private: bool
) -> tuple[str, list[Path]]:
    name = destination.removeprefix(HUB)
    if not REPOSITORY.fullmatch(name):
        raise UserError(f"--to: found {destination!r}; accepted: {HUB}OWNER/NAME or a directory")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("huggingface_hub is not installed; pip install 'compress[huggingface]'") from None
    if huggingface_hub.get_token() is None:
        raise UserError("--to: found no token of the Hub; accepted: one from `hf auth login`, or in HF_TOKEN")
    with tempfile.TemporaryDirectory() as temporary:
        filled = _fill(Path(temporary), run, files, record, licence)
        hub = huggingface_hub.HfApi()
        try:
            address = hub.create_repo(name, private=private, exist_ok=True)
            message = f"Add {record.student.model} for {record.data.name}"
            hub.upload_folder(repo_id=name, folder_path=temporary, commit_message=message)
        except Exception as failure:  # its client has one for each of connection, token and name, without a common base
            reason = first_line(failure)
            raise UserError(f"--to: {name} cannot be written ({reason}); accepted: a repository of yours") from failure
    return str(address), [Path(file.name) for file in filled]
