"""Checks whether PyTorch is recording a graph of a network for compilation or export."""

import torch


def compiling_or_exporting() -> bool:
    """Return whether a graph is recorded, which should process whole maps instead of strips."""
    return torch.compiler.is_compiling() or _is_tracing()


def exporting() -> bool:
    """Return whether a graph for images of any size is recorded, which must not depend on the example's size."""
    return torch.compiler.is_exporting() or _is_tracing()


def _is_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
