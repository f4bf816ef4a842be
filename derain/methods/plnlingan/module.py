"""PLNLIN-MCDDL as a LightningModule: generator and discriminator take turns, by manual optimisation."""

import logging
from collections.abc import Sequence
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
from derain.methods.plnlingan.loss import Parts, hierarchical_losses, relativistic_losses, weighted_sum
from derain.methods.plnlingan.network import (
    MCDDL,
    PLNLIN,
    SCALES,
    Branches,
    Interaction,
    Restored,
    Style,
    Unit,
    feature_map,
)
from derain.nn.padding import pad_to_multiple
from derain.nn.schedule import multiplied_at
from derain.nn.ssim import structural_similarity

log = logging.getLogger("derain")


class PLNLINGANModule(DerainModule, Explains):
    """PLNLIN-MCDDL: an interactive generator against a discriminator that sees its features too.

    Wang et al., Progressive Local and Non-Local Interactive Networks with Deeply Discriminative Training, MM 2024.
    ``network`` is the generator; the discriminator is part of checkpoints but not of files of weights. The trainer's
    steps are turns: batches, or ``accumulate`` of them.

    Args:
        channels: Width of the generator.
        stages: N of its PLNLIMs from the finest to the coarsest; the decoder has the same.
        hierarchy: N of the PLNLIMs of the hierarchical supervision.
        heads: Attention heads of the Swin blocks.
        unit: Of the generator: ``plnlim``, or chains of ``local`` or ``non-local`` blocks (Table 4).
        branches: Of a PLNLIM: ``both``, or both ``local`` or ``non-local`` (Table 3).
        interaction: Of the branches (Table 3): ``sft``, ``concatenation`` or ``none``.
        fusion: Whether a PLNLIM has a fusion branch (Table 3).
        last_interaction: Whether branches interact after the last stage too.
        discriminator_channels: Width of the discriminator.
        discriminator_stages: N of its PLNLIMs; section 4.1: 2.
        discriminator_unit: As ``unit`` (Table 6).
        discriminator_heads: Attention heads of its Swin blocks; ``heads`` by default.
        content: Whether the discriminator sees the generator's features (section 4.5.2).
        deep: Whether it judges at four scales, or at the coarsest alone (section 4.5.2).
        alpha: Weight of the hierarchical supervision (eq. 9); 0 is without (Table 5).
        beta: Weight of the adversarial losses (eq. 9); 0 is without a discriminator.
        generator_steps: r, of the generator for one of the discriminator (Table 7); paper: 5.
        discriminator_steps: The reverse: of the discriminator for one of the generator. One of both must be 1.
        learning_rate: Of both Adams; section 4.1: 1e-4.
        milestones: Epochs after which it is divided by 10; section 4.1: 300, 400 of 500.
        clip: Largest norm of a network's gradient; none by default. The discriminator's is small: eq. 12 weighs it.
        accumulate: Batches whose gradients are added up before a step.

    Raises:
        DerainError: If an option is out of its range.
    """

    compiles_any_size: ClassVar[bool] = False
    tile_multiple: ClassVar[int] = 56

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
                f"--model.generator_steps {generator_steps}, --model.discriminator_steps {discriminator_steps}: one of "
                "them must be 1, the other at least 1"
            )
        if accumulate < 1 or (clip is not None and clip <= 0) or min(alpha, beta) < 0:
            raise DerainError(
                f"--model.accumulate {accumulate} must be at least 1, clip {clip} above 0 or none, alpha {alpha} and "
                f"beta {beta} at least 0"
            )
        content = content and beta > 0
        if hierarchy < 1 and (alpha or content):
            raise DerainError(f"--model.hierarchy {hierarchy}: must be at least 1, or alpha 0 and content false too")
        style = Style(channels, unit, branches, interaction, fusion, last_interaction, heads)
        discriminator_heads = heads if discriminator_heads is None else discriminator_heads
        judging = Style(discriminator_channels, discriminator_unit, heads=discriminator_heads)
        self.network: PLNLIN = PLNLIN(style, stages, hierarchy if alpha or content else 0)
        self.discriminator = MCDDL(judging, channels if content else 0, deep, discriminator_stages) if beta else None
        first, second = ("local", "non-local") if branches == "both" else (branches, f"other {branches}")
        both = (f"{first} features", f"{second} features", "features of both")
        self.maps = both if unit == "plnlim" else (f"{unit} features",)
        self.updates = 0  # decides which network is updated next

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restores images of any size in [0, 1], without the hierarchy."""
        return cast(Tensor, self.network(rainy).derained)

    def export_graph(self) -> Graph:
        """Return ``forward``, without the discriminator's parameters."""
        return Graph(self.network, lambda rainy: cast(Tensor, self.network(rainy).derained))

    def explain(self, rainy: Float[Tensor, "b 3 h w"], **conditions: Any) -> Float[Tensor, "b n h w"]:
        """Return the derained image and the features of the last PLNLIM: of its branches and of both (Figure 4)."""
        restored: Restored = self.network(rainy, show=True)
        return torch.cat((restored.derained.float(), *map(feature_map, restored.shown)), dim=1)

    # Training.

    def configure_callbacks(self) -> list[Any]:
        """Refuses what goes with one optimiser alone, before the trainer does so less clearly."""
        asked = (self.trainer.gradient_clip_val, self.trainer.accumulate_grad_batches, self.trainer.precision)
        if self.is_fitting and (asked[:2] != (None, 1) or asked[2] == "16-mixed"):
            told = "--trainer.gradient_clip_val, accumulate_grad_batches, precision 16-mixed: for one optimiser"
            raise DerainError(f"{told}; use --model.clip, --model.accumulate, --trainer.precision bf16-mixed")
        return []

    def on_fit_start(self) -> None:
        """Refuses a strategy of several devices that waits for the gradients of whoever's turn it is not."""
        super().on_fit_start()
        if self.discriminator is not None:
            self.refuse_plain_ddp("generator and discriminator take turns, and one has no gradient")
        crop = getattr(getattr(self.trainer, "datamodule", None), "crop", self.network.multiple)
        if crop % self.network.multiple:
            log.warning("--data.crop %d: padded to a multiple of %d, in losses too", crop, self.network.multiple)

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        """A generator's turn, a discriminator's, or both."""
        hyper, count = self.hparams, len(batch["name"])
        rainy, clean = (pad_to_multiple(batch[key], self.network.multiple) for key in ("rainy", "clean"))
        turn = self.updates + 1
        generating = self.discriminator is None or turn % hyper["discriminator_steps"] == 0
        judging = self.discriminator is not None and turn % hyper["generator_steps"] == 0
        with torch.set_grad_enabled(generating):
            restored: Restored = self.network(rainy, hierarchy=len(self.network.joins) > 0)
        with torch.no_grad():
            known = self.discriminator is not None and len(self.discriminator.joins) > 0
            real = self.network(clean, hierarchy=True).features if known else []
        if generating:
            self._descend("train/loss", self.generator_losses(restored, clean, real), count)
        if judging:
            self._descend("train/discriminator", self.discriminator_losses(restored, clean, real), count)
        if (batch_idx + 1) % hyper["accumulate"] == 0 or self.trainer.is_last_batch:
            self._step(generating, judging)

    def generator_losses(self, restored: Restored, clean: Tensor, real: list[Tensor]) -> dict[str, list[Tensor]]:
        """Of eqs. 8, 10 and 11; the discriminator gets no gradient. ``real``: features of the clean images."""
        parts = {"pixel": [1 - structural_similarity(restored.derained, clean)]}
        if self.hparams["alpha"]:
            parts["hierarchical"] = hierarchical_losses(restored.images, clean)
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)  # its graph is built without its parameters
            fake = self.discriminator(restored.derained, restored.features)
            self.discriminator.requires_grad_(True)
            with torch.no_grad():
                truth = self.discriminator(clean, real)
            parts["generator"] = relativistic_losses(fake, truth)
        return parts

    def discriminator_losses(self, restored: Restored, clean: Tensor, real: list[Tensor]) -> dict[str, list[Tensor]]:
        """The reverse of eq. 8; the generator gets no gradient."""
        judge = cast(nn.Module, self.discriminator)
        fake = judge(restored.derained.detach(), [one.detach() for one in restored.features])
        return {"discriminator": relativistic_losses(judge(clean, real), fake)}

    def _descend(self, name: str, parts: Parts, count: int) -> None:
        """Add the gradients of a weighted sum of losses of ``count`` images, and log it with every part."""
        total = weighted_sum(parts, self.hparams["alpha"], self.hparams["beta"])
        self.log(name, total, prog_bar=name == "train/loss", batch_size=count)
        for part, losses in parts.items():
            scales = {f"train/{part}_{scale}": loss for scale, loss in enumerate(losses, SCALES + 1 - len(losses))}
            self.log_dict({"train/pixel": losses[0]} if part == "pixel" else scales, batch_size=count)
        self.manual_backward(total / self.hparams["accumulate"])

    def _step(self, generating: bool, judging: bool) -> None:
        """Lets whoever's turn it is take a step; the trainer counts one, also where both take one."""
        found: Any = self.optimizers()
        generator, *others = cast(list[LightningOptimizer], found if isinstance(found, list) else [found])
        if generating:
            generator.step()
            generator.zero_grad()
        for optimizer in others if judging else ():
            if generating:
                optimizer._on_before_step = optimizer._on_after_step = lambda: None
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse what is not finite, and clip the gradient."""
        norm = self.finite.require(self, optimizer)
        if self.hparams["clip"]:
            nn.utils.clip_grads_with_norm_(optimizer.param_groups[0]["params"], self.hparams["clip"], norm)

    def on_validation_model_zero_grad(self) -> None:
        """Keeps gradients that are being added up while validation comes in between."""

    def on_train_epoch_end(self) -> None:
        """Moves the schedules of the learning rates on."""
        schedules: Any = self.lr_schedulers()
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            schedule.step()

    def configure_optimizers(self) -> Any:
        """An Adam for each network, their learning rates divided by 10 at the milestones."""
        networks = [self.network] if self.discriminator is None else [self.network, self.discriminator]
        optimizers = [torch.optim.Adam(network.parameters(), self.hparams["learning_rate"]) for network in networks]
        factor = multiplied_at(self.hparams["milestones"], 0.1)
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
        names = ("lr-generator", "lr-discriminator")
        named = zip(schedules, names, strict=False)
        return optimizers, [{"scheduler": schedule, "name": name} for schedule, name in named]

    # Files.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add whose turn it is."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["updates"] = self.updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore whose turn it is."""
        super().on_load_checkpoint(checkpoint)
        key = "updates" if "updates" in checkpoint else "windows"  # "windows": checkpoints of earlier versions
        self.updates = checkpoint[key]
