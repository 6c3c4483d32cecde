"""The one exception for a mistake that the user can mend."""


class UserError(Exception):
    """One line that names the key or file, what was found and what is accepted.

    The command line prints it and exits with 2, without a traceback.
    """
