"""Whether a network runs eagerly, or a graph of its operations is made."""

import torch


def compiling_or_exporting() -> bool:
    """Return whether a graph is made, to compile or export it: it should contain whole maps, not strips of them."""
    return torch.compiler.is_compiling() or _is_tracing()


def exporting() -> bool:
    """Return whether a graph for images of any size is made: it must not depend on the size of the example image."""
    return torch.compiler.is_exporting() or _is_tracing()


def _is_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
