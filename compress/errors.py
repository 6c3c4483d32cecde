"""The one exception for a mistake that the user can mend."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """One line that names the key or file, what was found and what is accepted.

    The command line prints it and exits with 2, without a traceback.
    """


def first_line(failure: BaseException) -> str:
    """The first line of what `failure` says; its class where it says nothing."""
    return next((line.strip() for line in str(failure).splitlines() if line.strip()), type(failure).__name__)


def exit_code(work: Callable[[], int | None]) -> int:
    """The exit code after `work`: what that returns, or 2 for a mistake of the user, said in one line on stderr."""
    try:
        return work() or 0
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
