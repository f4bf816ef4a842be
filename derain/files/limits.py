"""Bound the size of a network that is built from the metadata of a file."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

SPARE_TENSORS, SPARE_NUMBERS = 5_000, 50_000_000
"""Parameters that a method may have beyond its file, such as those of a discriminator."""


SIZED = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
"""Functions whose positional arguments are the size of the new tensor."""


class _Allocations(TorchFunctionMode):
    """Refuses new tensors that are larger than the network may be, before their memory is touched.

    Args:
        numbers: Numbers in the file.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.limit = numbers, numbers + SPARE_NUMBERS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _new_elements(func, args, kwargs) > self.limit:
            raise ValueError(
                f"a network of more than {self.limit:,} numbers, where the file has at most {self.numbers:,}"
            )
        return func(*args, **kwargs)


def _new_elements(func: Any, args: Any, kwargs: Any) -> int | float:
    """Return the number of elements that a function creates; 0 for functions that do not create tensors by size."""
    if func in SIZED or func is torch.full:
        size = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list) else args)
        return math.prod(size) if isinstance(size, tuple | list) else size
    if func is torch.linspace:
        return float(kwargs.get("steps", args[2] if len(args) > 2 else 0))
    if func is torch.arange:
        return max(map(abs, args), default=0)
    return 0


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
        with _Allocations(numbers):
            yield
    finally:
        hook.remove()
