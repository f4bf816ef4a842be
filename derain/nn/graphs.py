"""Whether a network is only restoring or training, or runs so that a graph is made of it."""

import torch


def recorded() -> bool:
    """Whether operations are recorded: compiled, or exported. Cutting a map to save memory is of no use then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def recorded_for_all_sizes() -> bool:
    """Whether the graph shall hold for images of any size: nothing may be decided by the size of this one."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
