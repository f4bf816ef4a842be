"""Check that a training is finite: its losses and gradients, what it saves, and how it validates."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from derain.errors import DerainError

REMEDY = "checkpoints saved before are unharmed; lower --model.learning_rate, or look at these images"
NAMED = 8


def listed(names: Sequence[str]) -> str:
    """Return the names of images for a message.

    Example:
        >>> listed(["a", "b"]), listed("abcdefghij")
        ('a, b', 'a, b, c, d, e, f, g, h and 2 more')
    """
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def position(module: LightningModule, names: Sequence[str]) -> str:
    """Return epoch, step and images for a message; without names, the images are another device's."""
    images = f"images {listed(names)}" if names else "on another device"
    return f"epoch {module.current_epoch}, step {module.global_step}, {images}"


class FiniteCheck:
    """Losses and images of the batches since the last optimiser step, checked together with the gradient.

    The check before each step is one norm over all gradients and one transfer to the host.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.names: list[str] = []
        self._stepped = False

    def see_batch(self, batch: Any) -> None:
        """Note the images of a batch."""
        if self._stepped:
            self.names.clear()
        self._stepped = False
        self.names += batch.get("name", ()) if isinstance(batch, Mapping) else ()

    def see_loss(self, loss: Tensor) -> None:
        """Note a loss whose gradient is computed."""
        self.losses.append(loss.detach())

    def require(self, module: LightningModule, optimizer: torch.optim.Optimizer) -> Tensor:
        """Return the norm of the gradient before a step of an optimiser.

        An infinite gradient that is due to the scaling of losses (precision ``16-mixed``) is left to the scaler, which
        skips the step.

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
            what = "gradient" if losses.isfinite() else "loss"
            raise DerainError(f"{what} is not finite at {position(module, () if finite else self.names)}; {REMEDY}")
        return norm

    def refuse_anomaly(self, module: LightningModule, error: RuntimeError) -> None:
        """Refuse a gradient in which torch's anomaly detection found NaN.

        Args:
            module: Whose gradient it is.
            error: Raised in the backward pass.

        Raises:
            DerainError: If the error is one of anomaly detection.
        """
        if torch.is_anomaly_enabled() and "returned nan values" in str(error):
            message = f"gradient is not finite at {position(module, self.names)}"
            raise DerainError(f"{message} ({str(error).rstrip('.')}); {REMEDY}") from error


def require_finite(module: LightningModule, tensors: Iterable[Tensor], what: str) -> None:
    """Refuse to save tensors that are not finite.

    Raises:
        DerainError: If a value of them is not.
    """
    floating = [value.detach() for value in tensors if value.is_floating_point() and value.numel()]
    if floating and not nn.utils.get_total_norm(floating, norm_type=float("inf")).isfinite():
        raise DerainError(
            f"{what} not finite at epoch {module.current_epoch}, step {module.global_step}; not saved: {REMEDY}"
        )
