"""Lightning module of PLNLIN-MCDDL: alternating updates of generator and discriminator by manual optimisation."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.methods.base import DerainModule
from derain.methods.graph import Graph
from derain.methods.interfaces import Explains
from derain.methods.plnlingan.loss import LossesByName, hierarchical_losses, relativistic_losses, weighted_sum
from derain.methods.plnlingan.network import (
    MCDDL,
    PLNLIN,
    SCALES,
    Branches,
    Interaction,
    Restored,
    Unit,
    UnitConfig,
    feature_map,
)
from derain.nn.padding import pad_to_multiple
from derain.nn.schedule import multiplied_at
from derain.nn.ssim import structural_similarity

log = logging.getLogger("derain")


class PLNLINGANModule(DerainModule, Explains):
    """PLNLIN-MCDDL: interactive generator, and a discriminator that also receives the generator's features.

    Wang et al., Progressive Local and Non-Local Interactive Networks with Deeply Discriminative Training for Image
    Deraining, MM 2024. ``network`` is the generator; the discriminator is part of checkpoints but not of weights files.
    Every ``accumulate`` batches, the generator, the discriminator or both are updated, which the trainer counts as one
    step.

    Args:
        channels: Channels of the generator's features.
        stages: Number of stages N of the encoder's PLNLIM at each of four scales, the finest first; the decoder has the
            same numbers.
        hierarchy: Number of stages N of the PLNLIMs for hierarchical supervision; 0: no such PLNLIMs, which requires
            that ``alpha`` is 0, and ``content`` false or ``beta`` 0.
        heads: Attention heads of the generator's Swin blocks; must divide ``channels``.
        unit: Unit of the generator: ``plnlim``; or ``local`` or ``non-local``, a chain of such blocks (Table 4).
        branches: Branches of a PLNLIM: ``both``; ``local`` or ``non-local`` for two branches of that kind (Table 3).
        interaction: Interaction of the branches (Table 3): ``sft``, ``concatenation`` or ``none``.
        fusion: Whether a PLNLIM has a fusion branch (Table 3).
        last_interaction: Whether branches interact after the last stage too.
        discriminator_channels: Channels of the discriminator's features.
        discriminator_stages: Number of stages N of the discriminator's PLNLIMs; section 4.1: 2.
        discriminator_unit: Unit of the discriminator, see ``unit`` (Table 6).
        discriminator_heads: Attention heads of the discriminator's Swin blocks; None: as many as ``heads``.
        content: Whether the discriminator receives the generator's features (section 4.5.2).
        deep: Whether the discriminator returns logits at all four scales, or only at the coarsest (section 4.5.2).
        alpha: Weight of the hierarchical supervision (eq. 9); 0: none (Table 5).
        beta: Weight of the adversarial losses (eq. 9); 0: no discriminator.
        generator_steps: Updates r of the generator per update of the discriminator (Table 7); paper: 5.
        discriminator_steps: Updates of the discriminator per update of the generator. This or ``generator_steps`` must
            be 1.
        learning_rate: Learning rate of both Adam optimisers; section 4.1: 1e-4.
        milestones: Epochs after which the learning rate is divided by 10; section 4.1: 300, 400 of 500.
        clip: Maximum gradient norm of each network; None: no clipping. The discriminator's gradient is small, since
            the weights of eq. 12 are.
        accumulate: Number of batches whose gradients are accumulated before an update; at the end of an epoch, an
            update follows in any case.

    Raises:
        DerainError: If an option is out of its range.
    """

    bounded_by_file: ClassVar[bool] = True
    compiles_any_size: ClassVar[bool] = False
    tile_multiple: int = 56
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "PLNLIN": {},
        "PLNLIN, tiny": {"channels": 16, "stages": (1, 1, 1, 1), "hierarchy": 1, "heads": 1},
    }

    may_change = DerainModule.may_change | {"alpha", "clip"}

    def __init__(
        self,
        channels: int = 32,
        stages: Sequence[int] = (8, 4, 2, 2),
        hierarchy: int = 2,
        heads: int = 4,
        unit: Unit = "plnlim",
        branches: Branches = "both",
        interaction: Interaction = "sft",
        fusion: bool = True,
        last_interaction: bool = True,
        discriminator_channels: int = 32,
        discriminator_stages: int = 2,
        discriminator_unit: Unit = "plnlim",
        discriminator_heads: int | None = None,
        content: bool = True,
        deep: bool = True,
        alpha: float = 1.0,
        beta: float = 1.0,
        generator_steps: int = 5,
        discriminator_steps: int = 1,
        learning_rate: float = 1e-4,
        milestones: Sequence[int] = (300, 400),
        clip: float | None = None,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        if min(generator_steps, discriminator_steps) != 1:
            raise DerainError(
                f"--model.generator_steps {generator_steps}, --model.discriminator_steps {discriminator_steps}: "
                "expected 1 for one of them and at least 1 for the other"
            )
        if accumulate < 1 or (clip is not None and clip <= 0) or min(alpha, beta) < 0:
            raise DerainError(
                f"--model.accumulate {accumulate}, clip {clip}, alpha {alpha}, beta {beta}: expected accumulate of at "
                "least 1, clip above 0 or null, alpha and beta of at least 0"
            )
        content = content and beta > 0
        if hierarchy < 1 and (alpha or content):
            raise DerainError(
                f"--model.hierarchy {hierarchy}: expected at least 1, or --model.alpha 0 with --model.content false"
            )
        config = UnitConfig(channels, unit, branches, interaction, fusion, last_interaction, heads)
        discriminator_heads = heads if discriminator_heads is None else discriminator_heads
        discriminator_config = UnitConfig(discriminator_channels, discriminator_unit, heads=discriminator_heads)
        self.network: PLNLIN = PLNLIN(config, stages, hierarchy if alpha or content else 0)
        self.discriminator: MCDDL | None = None
        if beta:
            self.discriminator = MCDDL(discriminator_config, channels if content else 0, deep, discriminator_stages)
        first, second = ("local", "non-local") if branches == "both" else (branches, f"other {branches}")
        self.maps = (f"{unit} features",)
        if unit == "plnlim":
            self.maps = (f"{first} features", f"{second} features", "features of both")
        self.updates = 0  # determines which networks are updated next

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restore images in [0, 1] of any size, without computing the images of the hierarchy."""
        return cast(Tensor, self.network(rainy).derained)

    def export_graph(self) -> Graph:
        """Return ``forward`` as a graph, with the parameters of the generator only."""
        return Graph(self.network, lambda rainy: cast(Tensor, self.network(rainy).derained))

    def explain(self, rainy: Float[Tensor, "b 3 h w"], **conditions: Any) -> Float[Tensor, "b n h w"]:
        """Return the derained image and maps of features of the decoder's last unit, see `feature_map` (Figure 4).

        The maps of a PLNLIM show the first branch, the second branch, and the sum of all branches. A chain of blocks
        has one map.

        Args:
            rainy: Rainy images in [0, 1].
            **conditions: Not used; `encode` returns none.
        """
        restored: Restored = self.network(rainy, show=True)
        return torch.cat((restored.derained.float(), *map(feature_map, restored.shown)), dim=1)

    # Training.

    def configure_callbacks(self) -> list[Any]:
        """Refuse trainer options that require automatic optimisation; return no callbacks.

        Raises:
            DerainError: If the trainer clips or accumulates gradients, or has precision ``16-mixed``.
        """
        if not self.is_fitting:
            return []
        trainer = self.trainer
        if trainer.gradient_clip_val is not None:
            self._refuse(f"gradient_clip_val {trainer.gradient_clip_val}", "--model.clip")
        if trainer.accumulate_grad_batches != 1:
            self._refuse(f"accumulate_grad_batches {trainer.accumulate_grad_batches}", "--model.accumulate")
        if trainer.precision == "16-mixed":
            self._refuse("precision 16-mixed", "--trainer.precision bf16-mixed")
        return []

    def _refuse(self, option: str, alternative: str) -> None:
        raise DerainError(
            f"--trainer.{option}: not supported with manual optimisation of two networks; use {alternative}"
        )

    def on_fit_start(self) -> None:
        """Refuse distributed strategies that wait for gradients of all parameters; warn about crops that need padding.

        Raises:
            DerainError: If there is a discriminator, and the trainer has such a strategy.
        """
        super().on_fit_start()
        if self.discriminator is not None:
            self.refuse_plain_ddp("only one of generator and discriminator has gradients")
        crop = getattr(getattr(self.trainer, "datamodule", None), "crop", self.network.multiple)
        if crop % self.network.multiple:
            log.warning(
                "--data.crop %d: crops are padded to a multiple of %d, and losses include the padding; use a multiple",
                crop,
                self.network.multiple,
            )

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Compute the gradients of the networks to be updated next; update them after ``accumulate`` batches."""
        count = len(batch["name"])
        rainy = pad_to_multiple(batch["rainy"], self.network.multiple)
        clean = pad_to_multiple(batch["clean"], self.network.multiple)
        update_number = self.updates + 1
        update_generator = self.discriminator is None or update_number % self.hparams["discriminator_steps"] == 0
        update_discriminator = self.discriminator is not None and update_number % self.hparams["generator_steps"] == 0
        with torch.set_grad_enabled(update_generator):
            restored: Restored = self.network(rainy, hierarchy=len(self.network.joins) > 0)
        clean_features = self._clean_features(clean)
        if update_generator:
            self._backward("train/loss", self.generator_losses(restored, clean, clean_features), count)
        if update_discriminator:
            self._backward("train/discriminator", self.discriminator_losses(restored, clean, clean_features), count)
        if (batch_idx + 1) % self.hparams["accumulate"] == 0 or self.trainer.is_last_batch:
            self._update(update_generator, update_discriminator)

    @torch.no_grad()
    def _clean_features(self, clean: Tensor) -> list[Tensor]:
        """Return the generator's features of clean images; empty if the discriminator receives no features."""
        if self.discriminator is None or not len(self.discriminator.joins):
            return []
        return cast(Restored, self.network(clean, hierarchy=True)).features

    def generator_losses(
        self, restored: Restored, clean: Tensor, clean_features: list[Tensor]
    ) -> dict[str, list[Tensor]]:
        """Return the unweighted losses of eqs. 8, 10 and 11 by name, without gradients for the discriminator.

        Without a discriminator, there are none of eq. 8; with ``alpha`` 0, none of eq. 11.

        Args:
            restored: Output of the generator for the rainy images.
            clean: Clean images in [0, 1], padded like the rainy images.
            clean_features: The generator's features of the clean images, see `_clean_features`.
        """
        parts = {"pixel": [1 - structural_similarity(restored.derained, clean)]}
        if self.hparams["alpha"]:
            parts["hierarchical"] = hierarchical_losses(restored.images, clean)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)  # no graph for its parameters
            derained_logits = self.discriminator(restored.derained, restored.features)
            self.discriminator.requires_grad_(True)
            with torch.no_grad():
                clean_logits = self.discriminator(clean, clean_features)
            parts["generator"] = relativistic_losses(derained_logits, clean_logits)
        return parts

    def discriminator_losses(
        self, restored: Restored, clean: Tensor, clean_features: list[Tensor]
    ) -> dict[str, list[Tensor]]:
        """Return the unweighted losses of the discriminator, without gradients for the generator.

        They are those of eq. 8 with clean and derained images exchanged. Arguments are those of `generator_losses`.
        """
        discriminator = cast(nn.Module, self.discriminator)
        derained_features = [features.detach() for features in restored.features]
        derained_logits = discriminator(restored.derained.detach(), derained_features)
        clean_logits = discriminator(clean, clean_features)
        return {"discriminator": relativistic_losses(clean_logits, derained_logits)}

    def _backward(self, name: str, parts: LossesByName, count: int) -> None:
        """Accumulate the gradients of the weighted sum of the losses; log the sum and each loss.

        Args:
            name: Name of the sum in the log.
            parts: Unweighted losses by name.
            count: Number of images in the batch.
        """
        total = weighted_sum(parts, self.hparams["alpha"], self.hparams["beta"])
        self.log(name, total, prog_bar=name == "train/loss", batch_size=count)
        for part, losses in parts.items():
            if part == "pixel":
                self.log("train/pixel", losses[0], batch_size=count)
                continue
            first = SCALES + 1 - len(losses)  # fewer losses than scales belong to the coarsest scales
            scales = {f"train/{part}_{scale}": loss for scale, loss in enumerate(losses, first)}
            self.log_dict(scales, batch_size=count)
        self.manual_backward(total / self.hparams["accumulate"])

    def _update(self, update_generator: bool, update_discriminator: bool) -> None:
        """Update one network or both; the trainer counts a single step.

        Args:
            update_generator: Whether to update the generator.
            update_discriminator: Whether to update the discriminator.
        """
        optimizers: Any = self.optimizers()
        if not isinstance(optimizers, list):
            optimizers = [optimizers]
        if update_generator:
            generator_optimizer: LightningOptimizer = optimizers[0]
            generator_optimizer.step()
            generator_optimizer.zero_grad()
        if update_discriminator:
            discriminator_optimizer: LightningOptimizer = optimizers[1]
            if update_generator:  # keeps the trainer from counting a second step
                discriminator_optimizer._on_before_step = discriminator_optimizer._on_after_step = lambda: None
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()
        self.updates += 1

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that losses and gradients are finite; clip gradients if ``clip`` is set.

        Raises:
            DerainError: If a value is not finite.
        """
        norm = self.finite.check(self, optimizer)
        if self.hparams["clip"]:
            nn.utils.clip_grads_with_norm_(optimizer.param_groups[0]["params"], self.hparams["clip"], norm)

    def on_validation_model_zero_grad(self) -> None:
        """Do nothing, so that accumulated gradients are kept during validation."""

    def on_train_epoch_end(self) -> None:
        """Step the learning rate schedules, which count epochs."""
        schedules: Any = self.lr_schedulers()
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            schedule.step()

    def configure_optimizers(self) -> Any:
        """Return Adam for each network, with a schedule that divides the learning rate by 10 at the milestones."""
        networks = [self.network] if self.discriminator is None else [self.network, self.discriminator]
        optimizers = [torch.optim.Adam(network.parameters(), self.hparams["learning_rate"]) for network in networks]
        factor = multiplied_at(self.hparams["milestones"], 0.1)
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
        names = ("lr-generator", "lr-discriminator")[: len(schedules)]
        configurations = [
            {"scheduler": schedule, "name": name} for schedule, name in zip(schedules, names, strict=True)
        ]
        return optimizers, configurations

    # Files.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the number of updates to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["updates"] = self.updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the number of updates."""
        super().on_load_checkpoint(checkpoint)
        key = "updates" if "updates" in checkpoint else "windows"  # "windows": checkpoints of earlier versions
        self.updates = checkpoint[key]
