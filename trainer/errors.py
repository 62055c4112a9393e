"""Errors that a user can act on."""


class TrainError(Exception):
    """Data, options or weights do not fit; the message says what, and what to do next."""


def missing_library(error: ModuleNotFoundError, extra: str) -> str:
    """What to install where the commands are and the libraries of an extra are not.

    Raises:
        ModuleNotFoundError: the same, if it is a module of ours.
    """
    name = str(error.name).partition(".")[0]
    if name == "ipa":
        raise error
    return f"{name} is missing: pip install 'ipa-runtime[{extra}]'"
