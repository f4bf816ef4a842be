"""PReNet as a LightningModule: when to step, log and schedule."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.methods.base import DerainModule
from derain.methods.prenet.network import (
    VARIANTS,
    PReNet,
    Variant,
    is_real_rain_generator,
    published_network,
    variant_of,
)
from derain.nn.schedule import multiplied_at
from derain.nn.ssim import structural_similarity

log = logging.getLogger("derain")


class PReNetModule(DerainModule):
    """PReNet and its ablations (Ren et al., Progressive Image Deraining Networks, CVPR 2019).

    Trained by the negative SSIM of the last stage with Adam; the learning rate falls at three epochs.

    Args:
        variant: ``PReNet``; ``PReNet_r`` (one residual block applied five times); ``PRN`` and ``PRN_r``
            (the same two without recurrent layer); ``PReNet_LSTM`` (PReNet whose stages output the image itself
            instead of what is added to the rainy one).
        stages: Number of recurrent stages, 1 to 100; paper: 6.
        learning_rate: Of Adam; section 4 of the paper: 1e-3.
        milestones: Epochs after which the learning rate is multiplied by ``decay``; paper: 30, 50, 80 of 100.
        decay: Paper: 0.2.
    """

    bytes_per_pixel: ClassVar[int] = 1600
    published_options: ClassVar[frozenset[str]] = frozenset({"variant", "stages"})

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
    def from_published(
        cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any
    ) -> "DerainModule | None":
        """Return the network of the authors' state dict, as ``net_latest.pth`` has it.

        Neither the number of stages nor ``PReNet_LSTM`` can be read off the tensors: options count first, then the
        folder's name as in the authors' repository, then 6 stages with a warning.

        Raises:
            DerainError: If an option does not fit the tensors.
        """
        found = variant_of(state)
        if found is None:
            return None
        if path is not None and not options and is_real_rain_generator(path):
            raise DerainError(
                f"{path}: of the authors' folder logs/real, whose network has PReNet's tensors but computes something "
                "else; derain does not have it; use the weights of another folder"
            )
        named = published_network(path) if path is not None else None
        variant = options.get("variant", named.variant if named else found)
        stages = options.get("stages", named.stages if named else 6)
        fitting = {found, "PReNet_LSTM"} if found == "PReNet" else {found}
        if variant not in fitting or not isinstance(stages, int):
            raise DerainError(
                f"{path}: variant {variant}, stages {stages}: its tensors are of {' or '.join(sorted(fitting))}, and "
                "stages are a whole number; give FILE:stages=N,variant=NAME"
            )
        module = cls(variant=variant, stages=stages)
        module.network.load_state_dict(dict(state), strict=True)
        if named or options:
            log.info("%s: %s with %d stages", path, variant, stages)
        else:
            log.warning(
                "%s: the file does not record the number of stages%s; assuming %s with %d stages; name others by "
                "FILE:stages=N%s",
                path,
                " or the variant" if len(fitting) > 1 else "",
                variant,
                stages,
                ",variant=PReNet_LSTM" if len(fitting) > 1 else "",
            )
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
