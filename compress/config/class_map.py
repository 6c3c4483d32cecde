"""Which class of a teacher stands for each class of the data, from a file."""

from collections.abc import Sequence
from pathlib import Path

from yaml import YAMLError

from compress import yaml_file
from compress.errors import UserError, first_line


def mapped(file: str, class_names: Sequence[str], where: str) -> list[int | str]:
    """For each of `class_names`, in order, the index or the name in the YAML or JSON mapping in `file`.

    Raises UserError, naming the key `where`, for anything but a mapping of at least these names.
    """
    accepted = "accepted: a YAML or JSON file that maps each class of the data to an index or a name of the teacher's"
    try:
        mapping = yaml_file.load(Path(file).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, YAMLError) as failure:
        raise UserError(f"{where}: {file} cannot be read ({first_line(failure)}); {accepted}") from None
    if not isinstance(mapping, dict):
        raise UserError(f"{where}: found a {type(mapping).__name__} in {file}; {accepted}")
    by_name = {str(name): value for name, value in mapping.items()}
    for name in class_names:
        value = by_name.get(name)
        if isinstance(value, bool) or not isinstance(value, int | str):
            found = f"{value!r} for {name!r}" if name in by_name else f"no {name!r}"
            raise UserError(f"{where}: found {found} in {file}; {accepted}")
    return [by_name[name] for name in class_names]
