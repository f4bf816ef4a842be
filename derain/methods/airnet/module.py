"""Lightning module of AirNet: a contrastive loss, first alone, then together with the error of the derained image."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.methods.regression.module import LossWeights, RegressionModule
from derain.networks.airnet import AirNet

MAX_QUEUE = 1 << 18
"""Maximum length of the queue. A weights file can request any length, since it does not contain the queue."""
PHASES = "derain.methods.airnet.module.PhasesLR"
"""Class path of the default schedule."""
LOSS: LossWeights = {"derained": {"l1": 1.0}, "contrast": {"mean": 0.1}}
"""Loss of the second phase: encoder and restoration, with the weights of the authors' code."""
ENCODER_LOSS: LossWeights = {"contrast": {"mean": 1.0}}
"""Loss of the first phase: the encoder alone."""


class AirNetModule(RegressionModule):
    """AirNet, whose encoder learns that two crops of an image have the same degradation.

    Li et al., All-In-One Image Restoration for Unknown Corruption, CVPR 2022. The contrastive loss of a crop (query) is
    the cross-entropy of identifying another crop of the same image (key) among the keys of earlier images. A moving
    average of the encoder computes the keys; a queue stores those of earlier images. Both are part of checkpoints, but
    not of weights files. ``loss`` can name the outputs ``derained``, the restored query, and ``contrast``, the
    contrastive loss.

    Args:
        network: Class of the network: ``AirNet``, or the path of a class that derives from it.
        network_options: Arguments of the class; None: its defaults, which are those of the paper.
        loss: Weights of the losses after the first phase, see `RegressionModule`; default: 1 for the mean absolute
            error of ``derained``, 0.1 for the contrastive loss.
        encoder_epochs: Epochs of the first phase, which trains the encoder alone, by the contrastive loss.
        crop: Side of query and key as a fraction of the side of the training crops (``--data.crop``), in (0, 1); the
            authors crop query and key from whole images.
        momentum: Weight of the old value when a batch updates the moving average, in [0, 1).
        temperature: Divisor of the cosine similarities of embeddings, above 0.
        queue: Number of keys of earlier images, 1 to 262,144; the authors use 256 times the batch size.
        optimizer: Class of the optimiser, see `RegressionModule`.
        learning_rate: Learning rate of the optimiser.
        optimizer_options: Further arguments of the optimiser.
        schedule: Schedule of the learning rate, see `RegressionModule`; default: `PhasesLR`.
        schedule_options: Options of the schedule. Their ``encoder_epochs``, for `PhasesLR`, defaults to the argument
            ``encoder_epochs``.

    Attributes:
        queued: Keys of earlier images, ``(queue, e)``; random before the first batches.
        position: Index in ``queued`` of the oldest key, which the next batch replaces first.

    Raises:
        DerainError: If an option is unknown or out of its range, or ``network`` is not an AirNet.

    References:
        AirNet, sections 3.1 and 3.2, and the authors' code; He et al., Momentum Contrast for Unsupervised Visual
        Representation Learning, CVPR 2020, eqs. 1 and 2.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # `derain bench` counts the network with RegressionModule

    may_change = RegressionModule.may_change | {"encoder_epochs", "momentum", "temperature", "crop"}
    queued: Tensor
    position: Tensor

    def __init__(
        self,
        network: str = "AirNet",
        network_options: dict[str, Any] | None = None,
        loss: LossWeights | None = None,
        encoder_epochs: int = 100,
        crop: float = 0.5,
        momentum: float = 0.999,
        temperature: float = 0.07,
        queue: int = 256,
        optimizer: str = "Adam",
        learning_rate: float = 1e-3,
        optimizer_options: dict[str, Any] | None = None,
        schedule: str = PHASES,
        schedule_options: dict[str, Any] | None = None,
    ) -> None:
        phases = {"encoder_epochs": encoder_epochs} if schedule == PHASES else {}
        super().__init__(
            network=network,
            network_options=network_options,
            loss=LOSS if loss is None else loss,
            optimizer=optimizer,
            learning_rate=learning_rate,
            optimizer_options=optimizer_options,
            schedule=schedule,
            schedule_options=phases | (schedule_options or {}),
        )
        self.save_hyperparameters()
        if not isinstance(self.network, AirNet):
            raise DerainError(f"--model.network {network}: expected AirNet, or a class that derives from it")
        if not (
            0 < crop < 1 and 0 <= momentum < 1 and temperature > 0 and 1 <= queue <= MAX_QUEUE and encoder_epochs >= 0
        ):
            raise DerainError(
                f"--model.crop {crop}, momentum {momentum}, temperature {temperature}, queue {queue}, encoder_epochs "
                f"{encoder_epochs}: expected 0 < crop < 1, 0 <= momentum < 1, temperature > 0, "
                f"1 <= queue <= {MAX_QUEUE}, encoder_epochs >= 0"
            )
        self.joint_loss = self.loss
        self.encoder_epochs, self.crop, self.momentum, self.temperature = encoder_epochs, crop, momentum, temperature
        self.key_encoder = copy.deepcopy(self.network.encoder).requires_grad_(False)
        width = self.network.encoder.width
        self.register_buffer("queued", F.normalize(torch.randn(queue, width), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any) -> None:
        """Return None; `RegressionModule` loads the authors' weights."""
        return

    def on_fit_start(self) -> None:
        """Record the training sets, and refuse distributed strategies that wait for gradients of all parameters.

        Raises:
            DerainError: If the trainer has such a strategy.
        """
        super().on_fit_start()
        self.refuse_plain_ddp("the first phase trains only the encoder")

    def on_train_start(self) -> None:
        """Copy the encoder, which ``--weights`` may have changed, to the moving average, unless a run is resumed."""
        super().on_train_start()
        if self.global_step == 0:
            self.key_encoder.load_state_dict(cast(AirNet, self.network).encoder.state_dict())

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the loss of the current phase; ``encoder_epochs`` determines the phase."""
        self.loss = ENCODER_LOSS if self.current_epoch < self.encoder_epochs else self.joint_loss
        return super().training_step(batch, batch_idx)

    def outputs_and_targets(
        self, rainy: Float[Tensor, "b 3 h w"], clean: Float[Tensor, "b 3 h w"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return ``contrast`` and, if the loss of the current phase uses it, ``derained``; and their targets, by name.

        ``contrast`` is the contrastive loss of two random crops of each image, query and key. Its target is not used.
        ``derained`` is the restored query.

        Args:
            rainy: Rainy images in [0, 1].
            clean: Clean images in [0, 1].

        Raises:
            DerainError: If the loss of the current phase names another output.
        """
        unknown = sorted(set(self.loss) - {"derained", "contrast"})
        if unknown:
            raise DerainError(f"--model.loss {unknown[0]}: not an output of {self.title}; use derained or contrast")
        network = cast(AirNet, self.network)
        query, target = self._crop(rainy, clean)
        (other_crops,) = self._crop(rainy)
        outputs = network.outputs(query) if "derained" in self.loss else {"embedding": network.encoder(query)}
        outputs["contrast"] = self.contrast(outputs.pop("embedding"), other_crops)
        return outputs, dict.fromkeys(outputs, target)

    def _crop(self, *images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Return a random crop of each batch of images, at the same position in all of them."""
        height, width = images[0].shape[2:]
        rows, columns = (max(1, round(self.crop * side)) for side in (height, width))
        top, left = (int(torch.randint(spare + 1, ())) for spare in (height - rows, width - columns))
        return [image[..., top : top + rows, left : left + columns] for image in images]

    def contrast(self, embedding: Float[Tensor, "b e"], crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """Return the contrastive loss, and update the moving average of the encoder and the queue.

        Args:
            embedding: Embeddings of the queries.
            crops: Other crops of the same images, whose embeddings are the keys.
        """
        with torch.no_grad():
            for average, parameter in zip(
                self.key_encoder.parameters(), cast(AirNet, self.network).encoder.parameters(), strict=True
            ):
                average.lerp_(parameter, 1 - self.momentum)
            keys = F.normalize(self.key_encoder(crops).float(), dim=1)
        queries = F.normalize(embedding.float(), dim=1)
        with torch.autocast(queries.device.type, enabled=False):
            positive = (queries * keys).sum(1, keepdim=True)
            logits = torch.cat((positive, queries @ self.queued.clone().T), dim=1) / self.temperature
        self._enqueue(keys)
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    def _enqueue(self, keys: Float[Tensor, "b e"]) -> None:
        """Replace the oldest keys in the queue."""
        size = len(self.queued)
        kept = keys[-size:]
        index = (self.position + torch.arange(len(kept), device=keys.device)) % size
        self.queued[index] = kept
        self.position.copy_((self.position + len(kept)) % size)


class PhasesLR(torch.optim.lr_scheduler.LambdaLR):
    """Schedule of AirNet's learning rate, stepped by epoch.

    Args:
        optimizer: Optimiser with the initial learning rate.
        encoder_epochs: Epochs of the first phase.
        decay_epochs: Interval in epochs at which the learning rate is multiplied by 0.1 in the first phase.
        halving_epochs: Interval in epochs at which the learning rate is halved in the second phase, from 0.1 times the
            initial one.

    Raises:
        DerainError: If an interval is below 1, or ``encoder_epochs`` is negative.

    References:
        The authors' code. At the end of an epoch, this code computes the learning rate of the next epoch from the index
        of the epoch that ends. Each change therefore takes effect one epoch late.

    Example:
        >>> optimizer = torch.optim.Adam([torch.zeros(1)], 1e-3)
        >>> factor = PhasesLR(optimizer).lr_lambdas[0]
        >>> [round(factor(epoch), 4) for epoch in (0, 60, 61, 101, 225, 226, 351)]
        [1.0, 1.0, 0.1, 0.1, 0.1, 0.05, 0.025]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        encoder_epochs: int = 100,
        decay_epochs: int = 60,
        halving_epochs: int = 125,
    ) -> None:
        for name, value, minimum in (
            ("encoder_epochs", encoder_epochs, 0),
            ("decay_epochs", decay_epochs, 1),
            ("halving_epochs", halving_epochs, 1),
        ):
            if not value >= minimum:
                raise DerainError(f"--model.schedule_options {name} {value}: expected at least {minimum}")

        def factor(epoch: int) -> float:
            finished = max(epoch - 1, 0)
            if finished <= encoder_epochs:
                return float(0.1 ** (finished // decay_epochs))
            return float(0.1 * 0.5 ** ((finished - encoder_epochs) // halving_epochs))

        functions: list[Callable[[int], float]] = [factor for _ in optimizer.param_groups]
        super().__init__(optimizer, functions)
