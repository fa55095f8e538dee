"""Errors of the package, and their text in one line."""


class CannotBuildError(ValueError):
    """A file's network cannot be built, though the file is sound.

    It is a custom network that was not passed, or another one was passed, or its library is missing.
    """


def first_line(error: object) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
