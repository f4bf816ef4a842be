"""Limits on the size of networks that are built from the metadata of a file."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

SPARE_TENSORS, SPARE_ELEMENTS = 5_000, 50_000_000
"""Parameter tensors and elements that a method may have in addition to those of its file, such as a discriminator's."""

SIZED = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
"""Functions whose positional arguments are the size of a new tensor."""


class _Allocations(TorchFunctionMode):
    """Mode in which the functions of `_new_elements` create no tensor with more elements than the network may have.

    Args:
        elements: Number of elements in the file, or an upper bound.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.limit = elements, elements + SPARE_ELEMENTS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _new_elements(func, args, kwargs) > self.limit:
            raise ValueError(
                f"a network of more than {self.limit:,} elements; the file has at most {self.elements:,} elements"
            )
        return func(*args, **kwargs)


def _new_elements(func: Any, args: Any, kwargs: Any) -> int | float:
    """Return about how many elements the tensor that a function creates has; 0 for functions that are not limited."""
    if func in SIZED or func is torch.full:
        size = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list) else args)
        return math.prod(size) if isinstance(size, tuple | list) else size
    if func is torch.linspace:
        return float(kwargs.get("steps", args[2] if len(args) > 2 else 0))
    if func is torch.arange:  # at least half of the number, for positional arguments and steps of at least 1
        return max(map(abs, args), default=0)
    return 0


@contextmanager
def built_within(tensors: int, elements: int) -> Iterator[None]:
    """Limit the size of networks that the current thread builds in a block.

    Args:
        tensors: Number of tensors in the file.
        elements: Number of elements in the file, or an upper bound, such as its size in bytes.

    Raises:
        ValueError: If the networks have more than ``tensors + SPARE_TENSORS`` parameter tensors; or if their parameters
            together, or a new tensor, have more than ``elements + SPARE_ELEMENTS`` elements.

    Example:
        >>> from torch import nn
        >>> with built_within(tensors=2, elements=100):
        ...     network = nn.Linear(100_000, 1_000)
        Traceback (most recent call last):
        ValueError: a network of more than 50,000,100 elements; the file has at most 100 elements
    """
    thread, counted, size = get_ident(), 0, 0

    def count(module: Module, name: str, parameter: Parameter) -> None:
        nonlocal counted, size
        if get_ident() != thread:
            return
        counted, size = counted + 1, size + parameter.numel()
        for found, in_file, spare, kind in (
            (counted, tensors, SPARE_TENSORS, "tensors"),
            (size, elements, SPARE_ELEMENTS, "elements"),
        ):
            if found > in_file + spare:
                raise ValueError(
                    f"a network of more than {in_file + spare:,} {kind}; the file has at most {in_file:,} {kind}"
                )

    hook = register_module_parameter_registration_hook(count)
    try:
        with _Allocations(elements):
            yield
    finally:
        hook.remove()
