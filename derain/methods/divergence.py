"""Checks that losses, gradients and saved weights are finite."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from derain.errors import DerainError

REMEDY = "earlier checkpoints are intact; lower --model.learning_rate, or check these images"
"""Advice that ends the messages."""

MAX_NAMES = 8
"""Largest number of images that a message names."""


def join_names(names: Sequence[str]) -> str:
    """Join image names for a message; all but the first `MAX_NAMES` are only counted.

    Example:
        >>> join_names(["a", "b"]), join_names("abcdefghij")
        ('a, b', 'a, b, c, d, e, f, g, h and 2 more')
    """
    shown = ", ".join(names[:MAX_NAMES])
    hidden = len(names) - MAX_NAMES
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def position(module: LightningModule, names: Sequence[str] | None) -> str:
    """Return epoch, step and images for a message.

    Args:
        module: The module that is trained.
        names: Names of the images, empty if the batch has no names; None if another device has the images.
    """
    step = f"epoch {module.current_epoch}, step {module.global_step}"
    if names is None:
        return f"{step}, on another device"
    return f"{step}, images {join_names(names)}" if names else step


class FiniteCheck:
    """Checks losses and gradients before every optimiser step; errors name the images of the step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.names: list[str] = []
        self._stepped = False

    def record_batch(self, batch: Any) -> None:
        """Record the names of all images of a batch, unlabelled ones included.

        The first batch after an optimiser step replaces the names of earlier batches.

        Args:
            batch: The batch, with names in ``name`` and ``unlabelled_name``. Without these entries, or if it is not a
                mapping, no names are recorded.
        """
        if self._stepped:
            self.names.clear()
        self._stepped = False
        for key in ("name", "unlabelled_name"):
            self.names += batch.get(key, ()) if isinstance(batch, Mapping) else ()

    def record_loss(self, loss: Tensor) -> None:
        """Record a loss that is about to be differentiated."""
        self.losses.append(loss.detach())

    def check(self, module: LightningModule, optimizer: torch.optim.Optimizer) -> Tensor:
        """Check the recorded losses and the gradients of an optimiser before its step.

        With precision ``16-mixed``, gradients of the scaled loss may overflow: the scaler then skips the step and
        reduces the loss scale. Gradients that are not finite are therefore accepted while the scale is above 1.

        Args:
            module: The module that is trained.
            optimizer: The optimiser that is about to step.

        Returns:
            L2 norm of all gradients of the optimiser, ``()``.

        Raises:
            DerainError: If, on any device, a loss is not finite, or a gradient is not finite and not accepted.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        total = torch.stack([loss.float().to(norm.device) for loss in self.losses] or [norm.new_zeros(())]).sum()
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and scaler.get_scale() > 1
        finite = bool((total if scaled else total + norm).isfinite())
        self.losses.clear()
        self._stepped = True
        if not module.trainer.strategy.reduce_boolean_decision(finite, all=True):
            quantity = "gradient" if total.isfinite() else "loss"
            raise DerainError(
                f"{quantity} is not finite at {position(module, None if finite else self.names)}; {REMEDY}"
            )
        return norm

    def refuse_anomaly(self, module: LightningModule, error: RuntimeError) -> None:
        """Raise an error that names the images, if PyTorch's anomaly detection raised ``error``.

        Args:
            module: The module that is trained.
            error: Error of the backward pass.

        Raises:
            DerainError: If ``error`` is about NaN in a gradient.
        """
        if torch.is_anomaly_enabled() and "returned nan values" in str(error):
            message = f"gradient is not finite at {position(module, self.names)}"
            raise DerainError(f"{message} ({str(error).rstrip('.')}); {REMEDY}") from error


def require_finite(module: LightningModule, tensors: Iterable[Tensor], subject: str) -> None:
    """Check that tensors are finite before they are saved.

    Args:
        module: The module that is trained.
        tensors: Weights, EMA weights and gradients; integer tensors are ignored.
        subject: Subject and verb of the message, such as ``weights are``.

    Raises:
        DerainError: If a value is not finite.
    """
    floating = [value.detach() for value in tensors if value.is_floating_point() and value.numel()]
    if floating and not nn.utils.get_total_norm(floating, norm_type=float("inf")).isfinite():
        raise DerainError(
            f"{subject} not finite at epoch {module.current_epoch}, step {module.global_step}; not saved: {REMEDY}"
        )
