"""The exceptions for bad input, and for commands that were stopped from outside."""

import signal


class DerainError(ValueError):
    """Bad input, told in one line: what is wrong with which file or option, what was expected, what to do.

    The command line prints the line without a traceback and exits with code 2.

    Example:
        >>> raise DerainError("photo.jpg: not an image; give a JPEG, PNG, WebP, TIFF, BMP or AVIF file")
        Traceback (most recent call last):
        derain.errors.DerainError: photo.jpg: not an image; give a JPEG, PNG, WebP, TIFF, BMP or AVIF file
    """


class Stopped(KeyboardInterrupt):
    """A signal such as Ctrl-C's stopped a command.

    The command line prints the message and exits with the code by which shells know the signal.

    Args:
        message: What is left of the command's work, and how to continue, in one line.
        number: Of the signal.

    Example:
        >>> Stopped("interrupted", signal.SIGTERM).code
        143
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.code = 128 + int(number)
