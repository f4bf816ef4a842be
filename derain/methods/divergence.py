"""Checks that losses, gradients and saved weights of a training are finite."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from derain.errors import DerainError

REMEDY = "earlier checkpoints are intact; lower --model.learning_rate, or check these images"
MAX_NAMES = 8
"""Images that a message names."""


def listed(names: Sequence[str]) -> str:
    """Return the names of images for a message.

    Example:
        >>> listed(["a", "b"]), listed("abcdefghij")
        ('a, b', 'a, b, c, d, e, f, g, h and 2 more')
    """
    shown = ", ".join(names[:MAX_NAMES])
    hidden = len(names) - MAX_NAMES
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def position(module: LightningModule, names: Sequence[str]) -> str:
    """Return epoch, step and images for a message; without names, the images are those of another device."""
    images = f"images {listed(names)}" if names else "on another device"
    return f"epoch {module.current_epoch}, step {module.global_step}, {images}"


class FiniteCheck:
    """Check of losses and gradients before every optimiser step, which names the images of the step.

    A check costs one norm over all gradients and one transfer from the device.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.names: list[str] = []
        self._stepped = False

    def see_batch(self, batch: Any) -> None:
        """Record the images of a batch."""
        if self._stepped:
            self.names.clear()
        self._stepped = False
        self.names += batch.get("name", ()) if isinstance(batch, Mapping) else ()

    def see_loss(self, loss: Tensor) -> None:
        """Record a loss whose gradient is computed."""
        self.losses.append(loss.detach())

    def require(self, module: LightningModule, optimizer: torch.optim.Optimizer) -> Tensor:
        """Check the losses and the gradient before a step of an optimiser; return the norm of the gradient.

        With scaled losses (precision ``16-mixed``), an infinite gradient is no error: the scaler skips the step.

        Raises:
            DerainError: If a loss or the gradient is not finite, on any device.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        losses = torch.stack([loss.float().to(norm.device) for loss in self.losses] or [norm.new_zeros(())]).sum()
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and scaler.get_scale() > 1
        finite = bool((losses if scaled else losses + norm).isfinite())
        self.losses.clear()
        self._stepped = True
        if not module.trainer.strategy.reduce_boolean_decision(finite, all=True):
            quantity = "gradient" if losses.isfinite() else "loss"
            raise DerainError(f"{quantity} is not finite at {position(module, () if finite else self.names)}; {REMEDY}")
        return norm

    def refuse_anomaly(self, module: LightningModule, error: RuntimeError) -> None:
        """Raise an error that names the images, if torch's anomaly detection found a NaN in a gradient.

        Args:
            module: The module that is trained.
            error: Error of the backward pass.

        Raises:
            DerainError: If the error was raised by anomaly detection.
        """
        if torch.is_anomaly_enabled() and "returned nan values" in str(error):
            message = f"gradient is not finite at {position(module, self.names)}"
            raise DerainError(f"{message} ({str(error).rstrip('.')}); {REMEDY}") from error


def require_finite(module: LightningModule, tensors: Iterable[Tensor], subject: str) -> None:
    """Check that tensors are finite before they are saved.

    Args:
        module: The module that is trained.
        tensors: Weights, averages and gradients; integers are ignored.
        subject: Beginning of the message, such as ``weights are``.

    Raises:
        DerainError: If a value is not finite.
    """
    floating = [value.detach() for value in tensors if value.is_floating_point() and value.numel()]
    if floating and not nn.utils.get_total_norm(floating, norm_type=float("inf")).isfinite():
        raise DerainError(
            f"{subject} not finite at epoch {module.current_epoch}, step {module.global_step}; not saved: {REMEDY}"
        )
