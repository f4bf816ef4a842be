"""Exceptions for errors that users can correct, and for commands interrupted by a signal."""

import signal
from collections.abc import Sequence


class DerainError(ValueError):
    """Error that the user can correct, such as invalid input or a missing package.

    The message says what is wrong, with the value; what was expected; what to do. It is one line, except that
    `failed_files` adds a line for each file. Commands print it without a traceback and exit with code 2.

    Example:
        >>> raise DerainError("photo.jpg: not an image; use a JPEG, PNG, WebP, TIFF, BMP or AVIF file")
        Traceback (most recent call last):
        derain.errors.DerainError: photo.jpg: not an image; use a JPEG, PNG, WebP, TIFF, BMP or AVIF file
    """


class ArgumentError(DerainError):
    """Invalid argument; the message begins with the name of the argument.

    Commands print ``--`` before the message, which then begins with the option of the same name: ``--tile 50: …``.

    Example:
        >>> raise ArgumentError("tile 50: must be at least 64")
        Traceback (most recent call last):
        derain.errors.ArgumentError: tile 50: must be at least 64
    """


def failed_files(messages: Sequence[str]) -> DerainError:
    """Return one error for all files that failed.

    Args:
        messages: Message about each file, at least one.

    Example:
        >>> raise failed_files(["a.png: empty", "b.png: empty"])
        Traceback (most recent call last):
        derain.errors.DerainError: 2 files cannot be restored:
          a.png: empty
          b.png: empty
    """
    if len(messages) == 1:
        return DerainError(messages[0])
    return DerainError("\n  ".join([f"{len(messages)} files cannot be restored:", *messages]))


class Stopped(KeyboardInterrupt):
    """Command interrupted by a signal, for example by Ctrl-C.

    The command line prints the message and exits with ``code``.

    Args:
        message: One line, for example what was finished and how to continue.
        number: Signal number.

    Attributes:
        code: Exit code that shells use for the signal: 128 plus the signal number.

    Example:
        >>> Stopped("interrupted", signal.SIGTERM).code
        143
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.code = 128 + int(number)
