"""Lightning module of SSID-KD's semi-supervised stage."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.methods.regression.module import LossWeights, RegressionModule
from derain.methods.ssidkd.loss import dark_channel_loss, divergence, total_variation
from derain.methods.trainable import TrainableModule
from derain.networks.base import Network
from derain.networks.ssid_kd import SSIDKD

log = logging.getLogger("derain")

LOSS: LossWeights = {"derained": {"l1": 20.0}}
"""Loss of the pairs in the authors' code."""


class SSIDKDModule(RegressionModule):
    """SSID-KD's semi-supervised stage, on pairs and on rainy images without ground truth (``--data.unlabelled``).

    Training should start from weights of the supervised stage (``--weights``), in which `RegressionModule` trains the
    network. Three terms are added to the loss of the pairs. Dark channel and total variation, two priors of natural
    images, apply to the results of the pairs and of the unlabelled images. Both are sums over pixels, so their default
    weights fit only crops and batches of the authors' sizes: 2 crops of 128×128 pixels. The third term is the
    divergence between the coarsest features of both kinds of images; it is a mean.

    Args:
        network: Class of the network: ``SSIDKD``, or the path of a class that derives from it.
        network_options: Arguments of the class; None: its defaults, which are those of the paper.
        loss: Loss of the pairs, see `RegressionModule`; None: 20 times the mean absolute error.
        dark_channel: Weight of the dark channel, see `dark_channel_loss`.
        variation: Weight of the total variation, see `total_variation`.
        divergence: Weight of the divergence of the features of unlabelled images from those of pairs, see
            `derain.methods.ssidkd.loss.divergence`.
        window: Side of the windows of the dark channel in pixels; the authors use the side of their crops, 128.
        optimizer: Class of the optimiser, see `RegressionModule`.
        learning_rate: Learning rate of the optimiser.
        optimizer_options: Further arguments of the optimiser.
        schedule: Schedule of the learning rate, see `RegressionModule`.
        schedule_options: Options of the schedule.

    Raises:
        DerainError: If an option is out of its range, or the network is not an SSIDKD.

    References:
        The authors' code (``train_Rain200H_real.py``).
    """

    needs_unlabelled: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # `derain bench` counts the network with RegressionModule
    may_change = RegressionModule.may_change | {"dark_channel", "variation", "divergence", "window"}
    starts_from_weights: bool = False
    """Whether training starts from the weights of a file, see `start_from`."""

    def __init__(
        self,
        network: str = "SSIDKD",
        network_options: dict[str, Any] | None = None,
        loss: str | LossWeights | None = None,
        dark_channel: float = 1e-6,
        variation: float = 1e-6,
        divergence: float = 1e-6,
        window: int = 128,
        optimizer: str = "Adam",
        learning_rate: float = 1e-4,
        optimizer_options: dict[str, Any] | None = None,
        schedule: str = "constant",
        schedule_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            network=network,
            network_options=network_options,
            loss=LOSS if loss is None else loss,
            optimizer=optimizer,
            learning_rate=learning_rate,
            optimizer_options=optimizer_options,
            schedule=schedule,
            schedule_options=schedule_options,
        )
        self.save_hyperparameters()
        if not isinstance(self.network, SSIDKD):
            raise DerainError(f"--model.network {network}: expected SSIDKD, or a class that derives from it")
        self.term_weights = {"dark_channel": dark_channel, "variation": variation, "divergence": divergence}
        for name, weight in self.term_weights.items():
            if not 0 <= weight < math.inf:
                raise DerainError(f"--model.{name} {weight}: expected a number of at least 0, its weight")
        if window < 1:
            raise DerainError(f"--model.window {window}: expected at least 1")
        self.window = window

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any) -> None:
        """Return None: `RegressionModule` loads the authors' weights."""
        return

    def start_from(self, loaded: TrainableModule) -> None:
        """Record that training starts from the weights of a file."""
        super().start_from(loaded)
        self.starts_from_weights = True

    def on_train_start(self) -> None:
        """Warn if a new run starts from random weights."""
        super().on_train_start()
        if not self.starts_from_weights and self.global_step == 0:
            log.warning("%s: starts from random weights; load those of the supervised stage by --weights", self.title)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the sum of the loss of the pairs, the priors of all results and the divergence of the features."""
        outputs, targets = self.outputs_and_targets(batch["rainy"], batch["clean"])
        real = cast(Network, self.network).outputs(batch["unlabelled"])
        terms = self.loss_terms(outputs, targets)
        with torch.autocast(batch["rainy"].device.type, enabled=False):
            for kind, results in (("synthetic", outputs["derained"].float()), ("real", real["derained"].float())):
                dark_channel = dark_channel_loss(results, self.window)
                terms[f"dark_channel_{kind}"] = self.term_weights["dark_channel"] * dark_channel
                terms[f"variation_{kind}"] = self.term_weights["variation"] * total_variation(results)
            codes = outputs["code"].float(), real["code"].float()
            terms["divergence"] = self.term_weights["divergence"] * divergence(*codes)
        return self.log_terms(terms, batch)
