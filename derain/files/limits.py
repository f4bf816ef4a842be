"""Bound the size of a network that is built from the metadata of a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from torch.nn import Module, Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook

SPARE_TENSORS, SPARE_NUMBERS = 5_000, 50_000_000
"""Parameters that a method may have beyond its file, such as those of a discriminator."""


@contextmanager
def built_within(tensors: int, numbers: int) -> Iterator[None]:
    """Raise at the first parameter by which a network that this thread builds exceeds its file.

    A parameter is counted before its memory is touched, so that neither a long list of blocks nor a wide layer costs
    more than a moment.

    Args:
        tensors: Tensors in the file.
        numbers: Numbers in the file, at most its size in bytes.

    Raises:
        ValueError: If the network has more parameters than the file and what `SPARE_TENSORS` and `SPARE_NUMBERS` allow.

    Example:
        >>> from torch import nn
        >>> with built_within(tensors=2, numbers=100):
        ...     network = nn.Linear(100_000, 1_000)
        Traceback (most recent call last):
        ValueError: a network of more than 50,000,100 numbers, where the file has at most 100
    """
    thread, counted, size = get_ident(), 0, 0

    def count(module: Module, name: str, parameter: Parameter) -> None:
        nonlocal counted, size
        if get_ident() != thread:
            return
        counted, size = counted + 1, size + parameter.numel()
        for found, limit, spare, kind in (
            (counted, tensors, SPARE_TENSORS, "tensors"),
            (size, numbers, SPARE_NUMBERS, "numbers"),
        ):
            if found > limit + spare:
                raise ValueError(
                    f"a network of more than {limit + spare:,} {kind}, where the file has at most {limit:,}"
                )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
