"""Lightning module of Restormer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.methods.base import DerainModule
from derain.nn.restormer import Restormer
from derain.nn.schedule import warm_up_then_cosine


def mix_pairs(
    rainy: Float[Tensor, "b 3 h w"], clean: Float[Tensor, "b 3 h w"], beta: float
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"]]:
    """Return each pair of the batch mixed with the pair that a random permutation assigns to it (mixup).

    The weights are λ and 1 - λ, with λ drawn from Beta(``beta``, ``beta``) once per batch.

    Args:
        rainy: Rainy images in [0, 1].
        clean: Clean images in [0, 1].
        beta: Both parameters of the Beta distribution, above 0.

    References:
        ``Mixing_Augment`` of Restormer's authors (``basicsr/models/image_restoration_model.py``).
    """
    share = float(torch.distributions.Beta(beta, beta).sample())
    order = torch.randperm(len(rainy)).to(rainy.device)
    return share * rainy + (1 - share) * rainy[order], share * clean + (1 - share) * clean[order]


class RestormerModule(DerainModule):
    """Restormer (Zamir et al., CVPR 2022), trained by the mean absolute error with AdamW.

    The paper's recipe is ``experiments/rain13k.yaml``: the learning rate is constant for 92,000 of 300,000 steps, then
    decays to 1e-6 along a cosine. By default, the learning rate decays to 0 from the start.

    Args:
        dim: Channels at the finest level.
        blocks: Transformer blocks of each of the four levels.
        refinement: Transformer blocks at full resolution after the decoder.
        heads: Attention heads of each of the four levels; must divide its channels.
        expansion: Hidden channels of the feed-forward networks divided by their channels.
        learning_rate: Learning rate of AdamW; paper: 3e-4.
        weight_decay: Weight decay of AdamW; paper: 1e-4.
        warm_up: Fraction of the optimiser steps in which the learning rate rises linearly; paper: 0.
        hold: Fraction of the optimiser steps in which the learning rate is constant after the warm-up; paper: 92/300.
        min_learning_rate: Final learning rate; paper: 1e-6.
        mixup: ``beta`` of `mix_pairs`, applied to each batch with probability 1/2; None: no mixup. The authors' recipe
            for deraining: 1.2 (``Options/Deraining_Restormer.yml``, ``mixing_augs``).

    Raises:
        DerainError: If an option is out of its range.
    """

    bounded_by_file: ClassVar[bool] = True
    bytes_per_pixel: int = 4700
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"Restormer": {}}
    may_change = DerainModule.may_change | {"hold", "min_learning_rate", "mixup"}
    compiles_any_size: ClassVar[bool] = False  # torch 2.13 compiles frozen weights with wrong strides if sizes vary

    def __init__(
        self,
        dim: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        learning_rate: float = 3e-4,
        weight_decay: float = 1e-4,
        warm_up: float = 0.0,
        hold: float = 0.0,
        min_learning_rate: float = 0.0,
        mixup: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if min(warm_up, hold) < 0 or warm_up + hold >= 1:
            raise DerainError(
                f"--model.warm_up {warm_up}, --model.hold {hold}: expected shares of the training with a sum below 1"
            )
        if not 0 <= min_learning_rate <= learning_rate:
            raise DerainError(
                f"--model.min_learning_rate {min_learning_rate}: expected 0 to --model.learning_rate {learning_rate}"
            )
        if mixup is not None and not 0 < mixup < math.inf:
            raise DerainError(f"--model.mixup {mixup}: expected a number above 0, or null for no mixup")
        self.mixup = mixup
        self.learning_rate, self.weight_decay, self.warm_up = learning_rate, weight_decay, warm_up
        self.hold, self.min_learning_rate = hold, min_learning_rate
        self.network = Restormer(dim, blocks, refinement, heads, expansion)

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restore images in [0, 1] of any size."""
        return cast(Tensor, self.network(rainy))

    @classmethod
    def from_published(
        cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any
    ) -> "DerainModule | None":
        """Return the method with the authors' weights (``params`` in ``deraining.pth``), or None for other tensors."""
        if "refinement.0.attn.temperature" not in state:
            return None
        module = cls()
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if shapes != {name: tensor.shape for name, tensor in module.network.state_dict().items()}:
            return None
        module.network.load_state_dict(dict(state), strict=True)
        return module

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean absolute error; if ``mixup`` is set, that of mixed pairs with probability 1/2."""
        rainy, clean = batch["rainy"], batch["clean"]
        if self.mixup is not None and torch.rand(()) < 0.5:
            rainy, clean = mix_pairs(rainy, clean, self.mixup)
        loss = F.l1_loss(self(rainy).float(), clean)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["name"]))
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW and a learning rate schedule with linear warm-up, constant phase and cosine decay."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            warm_up_then_cosine(self.steps, self.warm_up, self.min_learning_rate / self.learning_rate, self.hold),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
