"""The exceptions for bad input, and for commands that were stopped from outside."""


class DerainError(ValueError):
    """Bad input, told in one line: what is wrong with which file or option, what was expected, what to do.

    The command line prints the line without a traceback and exits with code 2.

    Example:
        >>> raise DerainError("photo.jpg: not an image; give a JPEG, PNG, WebP, TIFF, BMP or AVIF file")
        Traceback (most recent call last):
        derain.errors.DerainError: photo.jpg: not an image; give a JPEG, PNG, WebP, TIFF, BMP or AVIF file
    """


class Stopped(Exception):  # noqa: N818  (no error)
    """A command was stopped by a signal.

    Args:
        message: What is left of its work, and how to continue, in one line.
        code: Exit code of the command: 128 and the number of the signal.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
