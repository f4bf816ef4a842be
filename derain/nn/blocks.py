"""Find the repeated blocks of a network, for callbacks that compile them or recompute their activations."""

from torch import nn


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network: modules in a ``Sequential`` or ``ModuleList`` whose class occurs several times.

    Layers of PyTorch and modules without submodules are not blocks. Blocks inside other blocks are omitted.

    Example:
        >>> from derain.nn.restormer import Restormer
        >>> network = Restormer(dim=8, blocks=(1, 2, 1, 1), refinement=1)
        >>> [type(block).__name__ for block in repeated_blocks(network)].count("TransformerBlock")
        10
    """
    in_sequence = [
        child
        for parent in network.modules()
        if isinstance(parent, nn.Sequential | nn.ModuleList)
        for child in parent.children()
        if next(child.children(), None) is not None and not type(child).__module__.startswith("torch.nn.")
    ]
    classes = [type(child) for child in in_sequence]
    blocks = list(dict.fromkeys(child for child in in_sequence if classes.count(type(child)) > 1))
    nested = {inner for block in blocks for inner in block.modules() if inner is not block}
    return [block for block in blocks if block not in nested]
