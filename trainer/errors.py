"""Errors that a user can act on."""


class TrainError(Exception):
    """Data, options or weights do not fit; the message says what, and what to do next."""
