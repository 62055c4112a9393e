"""Errors that a user can act on. Command-line tools print their message and exit with code 2."""


class IpaError(Exception):
    """Something the user gave or has does not fit; the message says what, and what to do next."""


class BundleError(IpaError):
    """A bundle is missing, damaged, unsafe or of another format."""


class EngineError(IpaError):
    """An engine cannot be opened, or a tensor does not fit it."""


class RequestError(IpaError):
    """A request (image, prompt, number or path) cannot be carried out as given."""


def first_line(error: Exception) -> str:
    """What a library's message says before it goes into details."""
    return str(error).strip().partition("\n")[0]
