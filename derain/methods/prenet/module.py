"""PReNet as a LightningModule: when to step, log and schedule."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.methods.base import DerainModule
from derain.methods.prenet.network import VARIANTS, PReNet, Variant, variant_of
from derain.nn.schedule import multiplied_at
from derain.nn.ssim import structural_similarity


class PReNetModule(DerainModule):
    """PReNet and its ablations (Ren et al., Progressive Image Deraining Networks, CVPR 2019).

    Trained by the negative SSIM of the last stage with Adam; the learning rate falls at three epochs.

    Args:
        variant: ``PReNet``; ``PReNet_r`` (one residual block applied five times); ``PRN`` and ``PRN_r``
            (the same two without recurrent layer).
        stages: Number of recurrent stages; the authors' weights use 6.
        learning_rate: Of Adam; section 4 of the paper: 1e-3.
        milestones: Epochs after which the learning rate is multiplied by ``decay``; paper: 30, 50, 80 of 100.
        decay: Paper: 0.2.
    """

    bytes_per_pixel: ClassVar[int] = 1600

    def __init__(
        self,
        variant: Variant = "PReNet",
        stages: int = 6,
        learning_rate: float = 1e-3,
        milestones: Sequence[int] = (30, 50, 80),
        decay: float = 0.2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate, self.milestones, self.decay = learning_rate, milestones, decay
        network = PReNet(stages=stages, **VARIANTS[variant])
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs

    def forward(self, rainy: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Restores images of any size in [0, 1]."""
        return cast(Tensor, self.network(rainy))

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor]) -> "DerainModule | None":
        """Takes the authors' state dict of any variant, as ``net_latest.pth`` holds it."""
        variant = variant_of(state)
        if variant is None:
            return None
        module = cls(variant=variant)
        module.network.load_state_dict(dict(state), strict=True)
        return module

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Negative SSIM of the last stage."""
        loss = -structural_similarity(self(batch["rainy"]), batch["clean"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["name"]))
        return loss

    def configure_optimizers(self) -> Any:
        """Adam, its learning rate divided at the milestones."""
        optimizer = torch.optim.Adam(self.network.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplied_at(self.milestones, self.decay))
        return {"optimizer": optimizer, "lr_scheduler": schedule}
