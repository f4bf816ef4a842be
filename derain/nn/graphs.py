"""Checks whether PyTorch is recording a graph of a network, to compile or export it."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def compiling_or_exporting() -> bool:
    """Return whether a graph is being recorded. Graphs should process whole maps instead of strips."""
    return torch.compiler.is_compiling() or _is_tracing()


def exporting() -> bool:
    """Return whether a graph for export is being recorded. Such a graph must not depend on the example image's size."""
    return torch.compiler.is_exporting() or _is_tracing()


def _is_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def has_no_values(x: Tensor) -> bool:
    """Return whether a tensor has a shape but no values. ``derain bench`` counts MACs with such tensors."""
    return x.is_meta or is_fake(x)
