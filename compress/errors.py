"""What ends a command with one line instead of a traceback: a mistake of the user, or the machine's refusal."""

import errno
import gc
import os
import sys
import unicodedata
from argparse import ArgumentParser
from collections.abc import Callable

# Of the file system, not of a program: no room, no right, no such place, a broken disk.
MACHINE = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EBUSY", "EDQUOT", "EFBIG", "EIO", "EISDIR", "ELOOP", "EMFILE", "ENAMETOOLONG", "ENFILE", "ENODEV"),
        *("ENOENT", "ENOMEM", "ENOSPC", "ENOTDIR", "ENOTEMPTY", "ENXIO", "EPERM", "EROFS", "ESTALE", "ETXTBSY"),
    )
}
MEMORY = (MemoryError.__name__, "OutOfMemoryError")  # Python's, and PyTorch's for a GPU

# New objects after which Python's collector looks for what nobody uses. Libraries make a million of them that stay, and
# at the usual 700 it takes a sixth of the start of a command and a fifth of an export to ExecuTorch.
COLLECT_AFTER = 20_000

# Unicode's categories of control characters, lone surrogates and separators of lines and paragraphs.
STEERING = ("Cc", "Cs", "Zl", "Zp")
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class UserError(Exception):
    """One line that names the key or file, what was found and what is accepted.

    The command line prints it and exits with 2, without a traceback.
    """


def printable(text: str, kept: str = "") -> str:
    """`text` with its control characters, but for those `kept`, as escapes: a file must not steer a terminal.

    So are marks that turn the direction of writing, and bytes of a file's name that are no characters.
    """
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode()
        if character not in kept and (unicodedata.category(character) in STEERING or character in TURNING)
        else character
        for character in text
    )


def first_line(failure: BaseException) -> str:
    """The first line of what `failure` says; its class where it says nothing."""
    return next((line.strip() for line in str(failure).splitlines() if line.strip()), type(failure).__name__)


def in_one_line(failure: Exception) -> str | None:
    """What to tell the user of `failure`; None for a fault of the program, which is to be seen with its traceback."""
    if isinstance(failure, UserError):
        return printable(str(failure))
    cause: BaseException | None = failure
    # Libraries have errors of their own that they raise from the machine's, such as Python's logging.
    while cause is not None and (what := _refused(cause)) is None:
        cause = cause.__cause__
    if cause is None:
        return None
    return printable(f"{what}; to go on after that: {getattr(failure, 'go_on', 'the same command')}")


def _refused(failure: BaseException) -> str | None:
    """What the machine would not do; None where it did not refuse anything."""
    if isinstance(failure, OSError) and failure.errno in MACHINE:
        return f"{failure.filename or 'a file'}: {failure.strerror}"
    if type(failure).__name__ in MEMORY:
        return "found too little memory; accepted: a smaller data.batch_size, or a smaller network"
    return None


def add_debug(parser: ArgumentParser) -> None:
    """Lets a script take `--debug`, see `exit_code`."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of whatever fails")


def exit_code(work: Callable[[], int | None], debug: bool | None = None) -> int:
    """The exit code after `work`: what that returns, or that of a failure which one line on stderr explains.

    2 is a mistake of the user, 1 what the machine refused, and 141, without a line, that nobody reads the output any
    more. With `debug`, by default whether `--debug` was typed, every failure passes on with its traceback.
    """
    gc.set_threshold(COLLECT_AFTER)
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, `head` perhaps, has had enough; the interpreter must not complain about it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as failure:
        line = in_one_line(failure)
        if line is None or ("--debug" in sys.argv if debug is None else debug):
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2 if isinstance(failure, UserError) else 1
