"""Callbacks that reduce the memory or time of training."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from derain.errors import DerainError
from derain.methods.trainable import TrainableModule
from derain.nn.blocks import repeated_blocks

COMPILATIONS = 64
"""Limit of the compilations of one class of blocks; each combination of channels, crop size and precision needs one.

Beyond the limit, PyTorch warns and runs the blocks without compilation.
"""

log = logging.getLogger("derain")


def _find_blocks(module: LightningModule, callback_name: str) -> list[nn.Module]:
    """Return the repeated blocks of a method's network.

    Args:
        module: The method.
        callback_name: Class of the callback, for messages.

    Raises:
        DerainError: If the network has no repeated blocks, or the module is not a `TrainableModule`.
    """
    if not isinstance(module, TrainableModule):
        raise DerainError(f"{callback_name}: {type(module).__name__} is not a TrainableModule; remove the callback")
    blocks = repeated_blocks(module.network)
    if not blocks:
        raise DerainError(
            f"{callback_name}: {module.title} has no repeated blocks; expected several modules of one class in a "
            "sequence or list; remove the callback"
        )
    return blocks


def _count(blocks: Sequence[nn.Module]) -> str:
    """Return the number of blocks by class, such as ``36 TransformerBlock``."""
    return ", ".join(f"{count} {name}" for name, count in Counter(type(block).__name__ for block in blocks).items())


def _recomputed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Return the result of ``forward``; the backward pass computes its intermediate results again."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


class GradientCheckpointing(Callback):
    """Compute the activations of repeated blocks again in the backward pass instead of storing them.

    Training needs less memory and more time. Blocks with batch normalisation are refused, since their running
    statistics would be updated twice.

    References:
        Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 2016.
    """

    def __init__(self) -> None:
        self._blocks: list[nn.Module] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the ``forward`` of each block by one that is computed again in the backward pass.

        Raises:
            DerainError: If the module is not a `TrainableModule`, its network has no repeated blocks, or they contain
                batch normalisation.
        """
        if stage != "fit":
            return
        blocks = _find_blocks(pl_module, type(self).__name__)
        for block in blocks:
            if any(isinstance(inner, _BatchNorm) for inner in block.modules()):
                raise DerainError(
                    f"{type(self).__name__}: {type(block).__name__} contains batch normalisation, whose statistics "
                    "would be updated twice; remove the callback"
                )
        for block in blocks:
            block.forward = partial(_recomputed, block.forward)
        self._blocks = blocks
        log.info("gradient checkpointing: %s", _count(blocks))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the ``forward`` of each block."""
        for block in self._blocks:
            del block.forward
        self._blocks = []


class CompileBlocks(Callback):
    """Compile the repeated blocks of the network for training steps with ``torch.compile``.

    Blocks are compiled instead of the whole network, since one compilation serves all blocks with the same number of
    channels and image size. Names of parameters do not change. Validation, which has images of many sizes, uses the
    blocks without compilation.

    Args:
        backend: Backend of ``torch.compile``, such as ``inductor``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._blocks: list[nn.Module] = []
        self._previous_limit = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the blocks.

        Raises:
            DerainError: If the module is not a `TrainableModule`, or its network has no repeated blocks.
        """
        if stage == "fit":
            self._blocks = _find_blocks(pl_module, type(self).__name__)
            log.info("compiling for training: %s", _count(self._blocks))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use compiled blocks from now on; a block is compiled when it is first called."""
        self._previous_limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(self._previous_limit, COMPILATIONS)
        self._enable()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the blocks without compilation."""
        self._disable()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the compiled blocks again; their compilations are cached."""
        if not trainer.sanity_checking:
            self._enable()

    def _enable(self) -> None:
        for block in self._blocks:
            block.compile(backend=self.backend, dynamic=False)

    def _disable(self) -> None:
        for block in self._blocks:
            block._compiled_call_impl = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the blocks, and the limit of compilations."""
        self._disable()
        if self._previous_limit:
            torch._dynamo.config.recompile_limit = self._previous_limit
        self._blocks, self._previous_limit = [], 0


class TensorFloat32(Callback):
    """Compute float32 matrix products in TF32 in ``derain fit``, on NVIDIA GPUs of compute capability 8.0 or higher.

    TF32 rounds factors to 10 bits of mantissa. PyTorch computes convolutions in TF32 by default, but matrix products
    only after ``torch.set_float32_matmul_precision("high")``. This callback makes the call. On other devices, it has no
    effect.
    """

    def __init__(self) -> None:
        self._previous: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the precision of matrix products if the device has TF32, and report it."""
        if stage != "fit":
            return
        device = trainer.strategy.root_device
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            log.info("TensorFloat32: no effect, %s has no TF32; matrix products in float32", device)
            return
        self._previous = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        log.info("TensorFloat32: matrix products in TF32 on %s", torch.cuda.get_device_name(device))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the precision of matrix products."""
        if self._previous is not None:
            torch.set_float32_matmul_precision(self._previous)
        self._previous = None
