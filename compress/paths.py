"""Where the YAML groups lie: beside the package in a checkout, inside it in a wheel, and in the user's own folders."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compress.errors import UserError

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
# In the environment, so that the processes which this one starts look in the same folders.
CONFIG_PATH = "COMPRESS_CONFIG_PATH"


def user_folders() -> list[Path]:
    """The folders of YAML groups that the user has named by `--config-dir` or `hydra.searchpath`."""
    return [Path(folder) for folder in os.environ.get(CONFIG_PATH, "").split(os.pathsep) if folder]


def user_folder(key: str, place: str) -> Path:
    """The folder of YAML groups that the user names as `key`. Raises UserError where there is none."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise UserError(f"{key}: found {place}, which is no folder; accepted: a folder of YAML groups like conf/")
    return folder


def of_the_user() -> str:
    """What an error says behind the options that it lists, where the user has named no folder of other ones."""
    return "" if user_folders() else ", or --config-dir DIR with others"


def config_folders() -> list[Path]:
    """All folders of YAML groups; an option is taken from the first that has it."""
    return [CONF, *user_folders()]


def search_words() -> list[str]:
    """What has to be typed again so that the user's folders are searched; nothing without any."""
    folders = [str(folder) for folder in user_folders()]
    if len(folders) > 1:
        return [f"hydra.searchpath=[{','.join(folders)}]"]
    return ["--config-dir", *folders] if folders else []


@contextmanager
def searching(folders: Sequence[Path]) -> Iterator[None]:
    """Within it, `folders` are searched too, by this process and those that it starts."""
    before = os.environ.get(CONFIG_PATH)
    os.environ[CONFIG_PATH] = os.pathsep.join(dict.fromkeys(map(str, [*user_folders(), *map(Path.absolute, folders)])))
    try:
        yield
    finally:
        if before is None:
            del os.environ[CONFIG_PATH]
        else:
            os.environ[CONFIG_PATH] = before


def import_from_here() -> None:
    """Lets `_target_` name a module in the working directory, after everything that is installed."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def option_files(group: str) -> dict[str, Path]:
    """The YAML file of each option of a `group`, in alphabetical order."""
    files: dict[str, Path] = {}
    for folder in config_folders():
        files = {file.stem: file for file in (folder / group).glob("*.yaml") if file.is_file()} | files
    return dict(sorted(files.items()))


def option_file(group: str, stem: str) -> Path | None:
    """The YAML file of the option `stem` of a `group`; None where no folder has one."""
    return option_files(group).get(stem)


def options(group: str) -> list[str]:
    """The options of a `group`, in alphabetical order."""
    return list(option_files(group))
