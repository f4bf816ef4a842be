"""Range of the number of iterations of recurrent networks."""

from derain.errors import DerainError

MAX_ITERATIONS = 100
"""Maximum number of iterations; without it, a small weights file could demand any run time."""


def check_iterations(iterations: int, minimum: int = 1) -> None:
    """Check a number of iterations.

    Raises:
        DerainError: If it is not an integer from ``minimum`` to `MAX_ITERATIONS`.
    """
    if not isinstance(iterations, int) or not minimum <= iterations <= MAX_ITERATIONS:
        raise DerainError(f"iterations {iterations}: expected an integer from {minimum} to {MAX_ITERATIONS}")
