"""Lightning module of Syn2Real: trains on pairs, and on unlabelled images by a Gaussian process of their features."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.methods.regression.module import LossWeights, RegressionModule
from derain.methods.syn2real.loss import gaussian_process_loss
from derain.networks.syn2real import Syn2Real

log = logging.getLogger("derain")

SCHEDULE = {"milestones": [100], "decay": 0.5}
"""Schedule of the authors: the learning rate is halved after 100 of 200 epochs."""
MAX_BANK = 1 << 16
"""Largest number of stored latent vectors."""


class Syn2RealModule(RegressionModule):
    """Syn2Real, trained on pairs and on rainy images without ground truth (``--data.unlabelled``).

    A bank stores the features of the last labelled crops as latent vectors. A Gaussian process predicts the latent
    vectors of unlabelled crops from their nearest neighbours in the bank; the prediction is their pseudo ground truth
    (`gaussian_process_loss`). The bank is saved in checkpoints, but not in weights files. If several devices train, the
    bank has the features of the crops of all devices.

    Args:
        network: Class of the network: ``Syn2Real``, or the path of a class that derives from it.
        network_options: Arguments of the class; None: its defaults, which are those of the paper.
        loss: Loss of the pairs, see `RegressionModule`. The recipe (``experiments/methods/syn2real-gp.yaml``) adds 0.04
            times the loss ``perceptual``.
        gp_weight: Weight of the loss of unlabelled images.
        phases: ``alternating``: the first batches of an epoch train on pairs, the last ones on unlabelled images, as in
            the authors' ``train.py``; ``joint``: every step trains on the sum of both losses, as in their later
            ``train_new_comb.py``.
        unlabelled_share: Fraction of the batches of an epoch that train on unlabelled images if the phases alternate,
            in (0, 1). None: ``u / (p + u)`` for ``u`` unlabelled images and ``p`` labelled crops per epoch, as in the
            authors' code; 1/2 if the data module does not count its images.
        bank: Maximum number of stored latent vectors, up to 65,536; the authors store those of all pairs.
        neighbours: Number of nearest latent vectors, and of furthest ones; at most ``bank``.
        optimizer: Class of the optimiser, see `RegressionModule`.
        learning_rate: Learning rate of the optimiser.
        optimizer_options: Further arguments of the optimiser.
        schedule: Schedule of the learning rate, see `RegressionModule`.
        schedule_options: Options of the schedule; None: for ``milestones`` those of the authors, otherwise none.

    Raises:
        DerainError: If an option is out of its range, or the network is not a Syn2Real.

    References:
        The authors' code (``GP.py``, ``train.py``).
    """

    needs_unlabelled: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # `derain bench` counts the network with RegressionModule
    may_change = RegressionModule.may_change | {"gp_weight", "neighbours"}

    def __init__(
        self,
        network: str = "Syn2Real",
        network_options: dict[str, Any] | None = None,
        loss: str | LossWeights = "smooth_l1",
        gp_weight: float = 0.0015,
        phases: Literal["alternating", "joint"] = "alternating",
        unlabelled_share: float | None = None,
        bank: int = 512,
        neighbours: int = 64,
        optimizer: str = "Adam",
        learning_rate: float = 2e-4,
        optimizer_options: dict[str, Any] | None = None,
        schedule: str = "milestones",
        schedule_options: dict[str, Any] | None = None,
    ) -> None:
        defaults = SCHEDULE if schedule == "milestones" else {}
        super().__init__(
            network=network,
            network_options=network_options,
            loss=loss,
            optimizer=optimizer,
            learning_rate=learning_rate,
            optimizer_options=optimizer_options,
            schedule=schedule,
            schedule_options=defaults if schedule_options is None else schedule_options,
        )
        self.save_hyperparameters()
        if not isinstance(self.network, Syn2Real):
            raise DerainError(f"--model.network {network}: expected Syn2Real, or a class that derives from it")
        if not 0 <= gp_weight < math.inf:
            raise DerainError(f"--model.gp_weight {gp_weight}: expected a number of at least 0")
        if unlabelled_share is not None and not 0 < unlabelled_share < 1:
            raise DerainError(f"--model.unlabelled_share {unlabelled_share}: expected a number between 0 and 1")
        if not 1 <= neighbours <= bank <= MAX_BANK:
            raise DerainError(
                f"--model.neighbours {neighbours}, bank {bank}: expected at least 1 neighbour, at least as many latent "
                f"vectors, and at most {MAX_BANK}"
            )
        self.gp_weight, self.phases, self.unlabelled_share = gp_weight, phases, unlabelled_share
        self.bank, self.neighbours = bank, neighbours
        # Not registered as buffers: DDP would send them at every step, and their size depends on that of the crops.
        self.labelled: Tensor | None = None
        self.position = 0

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any) -> None:
        """Return None: `RegressionModule` loads the authors' weights."""
        return

    def on_fit_start(self) -> None:
        """Refuse distributed strategies that wait for gradients of all parameters.

        Raises:
            DerainError: If the phases alternate and the trainer has such a strategy.
        """
        super().on_fit_start()
        if self.phases == "alternating":
            self.refuse_plain_ddp("batches of unlabelled images do not train the decoder")

    def on_train_start(self) -> None:
        """Log the length of the phases if they alternate."""
        super().on_train_start()
        if self.phases == "alternating":
            batches = int(self.trainer.num_training_batches)
            count = batches - self.first_unlabelled
            log.info("%s: %d of %d batches of an epoch train on unlabelled images", self.title, count, batches)

    @property
    def first_unlabelled(self) -> int:
        """Index of the first batch of an epoch that trains on unlabelled images if the phases alternate.

        Raises:
            DerainError: If the number of batches of an epoch is unlimited.
        """
        batches = self.trainer.num_training_batches
        if math.isinf(batches):
            raise DerainError("--model.phases alternating: epochs have no end; set --trainer.limit_train_batches")
        count = max(1, round(self._share() * batches))
        return int(batches - min(count, batches - 1))  # the first batch, of pairs, fills the bank

    def _share(self) -> float:
        """Return the fraction of batches that train on unlabelled images if the phases alternate."""
        if self.unlabelled_share is not None:
            return self.unlabelled_share
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "count"):
            return 0.5
        labelled_count, unlabelled_count = data.count("train") * data.repeat, data.count("unlabelled")
        return float(unlabelled_count / (labelled_count + unlabelled_count))

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the loss of the pairs, that of the unlabelled images, or the sum of both, depending on the phase."""
        joint = self.phases == "joint"
        on_unlabelled = not joint and batch_idx >= self.first_unlabelled and self._fits_bank(batch["unlabelled"])
        terms: dict[str, Tensor] = {}
        if not on_unlabelled:
            outputs, targets = self.outputs_and_targets(batch["rainy"], batch["clean"])
            terms |= self.loss_terms(outputs, targets)
            self._store(cast(Tensor, self.all_gather(outputs["features"].detach().float())))
        if joint or on_unlabelled:
            terms["gp"] = self.gp_weight * self._gp_loss(batch["unlabelled"])
        if on_unlabelled:  # `log_terms` logs a single loss only as the sum
            self.log("train/gp", terms["gp"], batch_size=len(batch["name"]))
        return self.log_terms(terms, batch)

    def _gp_loss(self, images: Float[Tensor, "b 3 h w"]) -> Tensor:
        """Return the loss of unlabelled images, in float32."""
        latents = cast(Syn2Real, self.network).outputs(images)["features"].float().flatten(1)
        labelled = cast(Tensor, self.labelled).to(latents.device).flatten(1)
        with torch.autocast(latents.device.type, enabled=False):
            return gaussian_process_loss(latents, labelled, self.neighbours)

    def _fits_bank(self, images: Float[Tensor, "b 3 h w"]) -> bool:
        """Return whether features of these crops have the size of those in the bank.

        If not, `training_step` trains on the pairs of the batch, which fill the bank.
        """
        if self.labelled is None:
            return False
        multiple = cast(Syn2Real, self.network).size_multiple  # also the ratio of image size to feature size
        return self.labelled.shape[2:] == torch.Size(math.ceil(side / multiple) for side in images.shape[2:])

    def _store(self, features: Float[Tensor, "*b c h w"]) -> None:
        """Store features of labelled crops; in a full bank they replace the oldest ones.

        Features of another size than those in the bank replace the whole bank.

        Args:
            features: Features of one device; or those of several devices, with a further first axis.
        """
        latents = features.flatten(0, -4)[-self.bank :]
        if self.labelled is None or self.labelled.shape[1:] != latents.shape[1:]:
            self.labelled, self.position = latents[:0], 0
        labelled = self.labelled.to(latents.device)
        spare = self.bank - len(labelled)
        if spare:
            labelled = torch.cat((labelled, latents[:spare]))
        replacing = latents[spare:]
        index = (self.position + torch.arange(len(replacing), device=latents.device)) % self.bank
        labelled[index] = replacing
        self.position = (self.position + len(replacing)) % self.bank
        self.labelled = labelled

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the bank during training."""
        super().on_save_checkpoint(checkpoint)
        if self.is_fitting and self.labelled is not None:
            checkpoint["bank"] = {"labelled": self.labelled, "position": self.position}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the bank if training resumes."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("bank")
        if self.is_fitting and saved is not None:
            self.labelled, self.position = saved["labelled"], saved["position"]
