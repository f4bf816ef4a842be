"""Lightning module that trains the controller of DA-CLIP."""

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from derain.batch import PairBatch
from derain.errors import DerainError
from derain.methods.clip import FrozenCLIP
from derain.methods.daclipsde.controller import Controller, DACLIPMetadata, Order, load_controller
from derain.methods.daclipsde.loss import contrastive_loss, cosines
from derain.methods.trainable import TrainableModule
from derain.nn.schedule import warm_up_then_cosine

log = logging.getLogger("derain")

CAPTION = "a photo"
"""Caption of all images if there is no caption table."""


class DACLIPModule(TrainableModule):
    """Training of DA-CLIP's controller, see `Controller`.

    Training minimises the sum of two contrastive losses (Pullabhotla, eqs. 3 and 4): between the content embedding of
    an image and the caption of its clean image, and between the degradation embedding and a word for the degradation.
    CLIP is frozen and not part of checkpoints. By default, the clean images are training examples too: if the word for
    all images were ``rainy``, the controller would have nothing to distinguish.

    Args:
        clip: Id on the Hugging Face hub, or a local directory; ``$DERAIN_CLIP`` takes precedence.
        order: Connections of the controller to the frozen tower: ``reversed`` or ``aligned``, see `Controller`.
        controller: Weights to start from, of this class or the authors'; default: CLIP's own tower.
        degradation: Word for rainy images without a caption table. A caption table (``--data.captions``) has its own
            words.
        clean: Word for clean images; None: the clean images are not training examples.
        equal_texts: Whether equal texts in a batch are all correct for an image with this text, see
            `contrastive_loss`; otherwise only the image's own text is.
        smallest: Minimum area of the random crops, which are resized for CLIP, as a fraction of the image's area, in
            (0, 1]; DA-CLIP: 0.9.
        learning_rate: Highest learning rate of AdamW, betas 0.9 and 0.98, epsilon 1e-6; DA-CLIP: 2e-5 on one GPU, 3e-5
            on four.
        weight_decay: Weight decay of parameters with at least two dimensions; the other parameters have none; DA-CLIP:
            0.05.
        warm_up: Fraction of the optimiser steps in which the learning rate rises, in [0, 1). Afterwards, the learning
            rate falls to 0 along a cosine.

    Raises:
        DerainError: If CLIP is not available, ``controller`` cannot be loaded or does not fit CLIP or ``order``, or an
            option is out of its range.
    """

    metadata_schema: ClassVar[Any] = DACLIPMetadata
    monitor: ClassVar[str] = "val/accuracy"
    may_change = TrainableModule.may_change | {"clip", "degradation", "clean", "equal_texts", "smallest"}

    def __init__(
        self,
        clip: str = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        order: Order = "reversed",
        controller: str | None = None,
        degradation: str = "rainy",
        clean: str | None = "clean",
        equal_texts: bool = True,
        smallest: float = 0.9,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.05,
        warm_up: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="controller")  # weights contain the whole controller
        if not 0 < smallest <= 1:
            raise DerainError(f"--model.smallest {smallest}: expected a number above 0 and at most 1")
        if not 0 <= warm_up < 1:
            raise DerainError(f"--model.warm_up {warm_up}: expected a share of the training, at least 0 and below 1")
        self.clip = FrozenCLIP(clip)
        self.initial_weights = {} if controller is None else {"controller": controller}
        if controller is None:
            self.network: Controller = Controller(self.clip.model, order)
        else:
            self.network, _ = load_controller(Path(controller), self.clip)
            if self.network.order != order:
                raise DerainError(f"--model.order {order}: {controller} has order {self.network.order}; use that order")
        self.clip_sha256: str | None = self.clip.sha256
        self._embeddings_by_text: dict[str, Tensor] = {}
        self._accuracy: dict[str, Any] = {}  # a dict, so that the metric is not a submodule
        self._warned: set[str] = set()
        self.words: list[str] = [degradation] if clean is None else [clean, degradation]

    # Training.

    def on_fit_start(self) -> None:
        """Record the training sets, move CLIP to the device, and collect the degradation words."""
        super().on_fit_start()
        self._find_words()
        self.clip.model.to(self.device)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the sum of the contrastive losses of content and degradation (eq. 4)."""
        images, captions, words = self._examples(batch)
        pixels = self.clip.pixels(random_resized_crop(images, self.hparams["smallest"], self.clip.side))
        embeddings = self.network(self.clip.model, pixels)
        scale = self.network.logit_scale.exp()
        losses = {
            "train/content": self._contrast(embeddings.content, captions, scale, "captions"),
            "train/degradation": self._contrast(embeddings.degradation, words, scale, "degradations"),
        }
        loss = losses["train/content"] + losses["train/degradation"]
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        self.log_dict(losses | {"train/scale": scale.detach()}, batch_size=len(images))
        return loss

    def _examples(self, batch: PairBatch) -> tuple[Tensor, list[str], list[str]]:
        """Return images, captions and words of a batch: rainy images, then clean images unless ``clean`` is None."""
        rainy, clean_word = batch["rainy"], self.hparams["clean"]
        captions = batch.get("caption") or [CAPTION] * len(rainy)
        words = batch.get("degradation") or [self.hparams["degradation"]] * len(rainy)
        if clean_word is None:
            return rainy, captions, words
        return torch.cat((rainy, batch["clean"])), captions * 2, words + [clean_word] * len(rainy)

    def _contrast(self, embeddings: Float[Tensor, "b d"], texts: list[str], scale: Tensor, kind: str) -> Tensor:
        """Return the contrastive loss over the batches of all devices; warn once per ``kind`` if all texts are equal.

        Args:
            embeddings: Embeddings of the images on this device.
            texts: Texts of the images.
            scale: Inverse temperature of the softmax.
            kind: ``captions`` or ``degradations``, for the warning.
        """
        text_embeddings = self._text_embeddings(texts).to(embeddings.device)
        ids = torch.tensor([_text_id(text) for text in texts], device=embeddings.device)
        if self.trainer.world_size > 1:
            embeddings = self._gathered(embeddings, sync_grads=True)
            text_embeddings, ids = self._gathered(text_embeddings), self._gathered(ids)
        same = ids[:, None] == ids if self.hparams["equal_texts"] else None
        if kind not in self._warned and bool((ids == ids[0]).all()):
            self._warned.add(kind)
            effect = "this part of the loss is 0" if same is not None else "the loss makes the images alike"
            log.warning(
                "all %d %s of a batch are %r, so they distinguish nothing; %s", len(ids), kind, texts[0], effect
            )
        return contrastive_loss(embeddings, text_embeddings, scale, same)

    def _gathered(self, values: Tensor, sync_grads: bool = False) -> Tensor:
        return self.all_gather(values, sync_grads=sync_grads).flatten(0, 1)  # type: ignore[union-attr]

    def _text_embeddings(self, texts: list[str]) -> Float[Tensor, "b d"]:
        """Return the embeddings of texts; CLIP computes each text only once."""
        new = sorted({text for text in texts if text not in self._embeddings_by_text})
        if new:
            self._embeddings_by_text |= dict(zip(new, self.clip.text_features(new, truncate=True), strict=True))
        return torch.stack([self._embeddings_by_text[text] for text in texts])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make the step, then clamp the inverse temperature ``exp(logit_scale)`` to the range from 1 to 100.

        Later hooks would be too late: a checkpoint may be saved right after the step.
        """
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.network.logit_scale.clamp_(0, math.log(100))

    def configure_optimizers(self) -> Any:
        """Return AdamW and a learning rate schedule with linear warm-up and cosine decay to 0."""
        matrices: list[Tensor] = []
        vectors: list[Tensor] = []
        for name, parameter in self.network.named_parameters():
            if parameter.ndim < 2 or name.endswith("bias"):
                vectors.append(parameter)
            else:
                matrices.append(parameter)
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        decay = self.hparams["weight_decay"]
        optimizer = torch.optim.AdamW(
            groups, self.hparams["learning_rate"], betas=(0.9, 0.98), eps=1e-6, weight_decay=decay
        )
        factor = warm_up_then_cosine(self.steps, self.hparams["warm_up"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Validation: zero-shot classification of the degradation.

    def on_validation_epoch_start(self) -> None:
        """Move CLIP to the device, collect the degradation words and reset the accuracy."""
        self.clip.model.to(self.device)
        self._find_words()
        if len(self.words) > 1:
            self._accuracy = {"all": MulticlassAccuracy(len(self.words), average="micro").to(self.device)}

    def _find_words(self) -> None:
        """Set ``words``: those of the caption tables, or ``degradation`` without tables; and ``clean`` unless None."""
        data: Any = getattr(self.trainer, "datamodule", None)
        words = set(getattr(data, "degradations", ()) or [self.hparams["degradation"]])
        if self.hparams["clean"] is not None:
            words.add(self.hparams["clean"])
        self.words = sorted(words)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Classify the degradation of the images by the nearest word; do nothing if there is only one word."""
        if not self._accuracy:
            return
        images, _, words = self._examples(batch)
        degradation = self.network(self.clip.model, self.clip.pixels(images)).degradation
        nearest = cosines(degradation, self._text_embeddings(self.words).to(images.device)).argmax(1)
        expected = torch.tensor([self.words.index(word) for word in words], device=images.device)
        self._accuracy["all"].update(nearest, expected)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy`` over the images of all devices; 0 if there is only one word."""
        accuracy = float(self._accuracy["all"].compute()) if self._accuracy else 0.0
        self.log("val/accuracy", accuracy, prog_bar=True)

    # Files.

    def usage_hint(self, path: Path, option: str) -> str:
        """Return the option that trains DA-CLIP + IR-SDE with the controller."""
        return f"use it in training: --model.controller {path}"

    @classmethod
    def from_published(
        cls, state: Mapping[str, Tensor], path: Path | None = None, **options: Any
    ) -> TrainableModule | None:
        """Return None: no weights of the authors are loaded as this class.

        Raises:
            DerainError: If the tensors contain the authors' controller, which only ``--model.controller`` loads.
        """
        if any("visual_control." in name for name in state):
            raise DerainError(
                f"{path}: contains the controller of DA-CLIP's authors, which does not restore images; pass it as "
                "--model.controller, or set DERAIN_CONTROLLER"
            )
        return None

    def metadata(self) -> dict[str, Any]:
        """Return the metadata, including CLIP's hash and the degradation words."""
        return super().metadata() | {"clip_sha256": self.clip_sha256, "words": self.words}

    def restore_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Restore the degradation words, and compare the hash of CLIP.

        Raises:
            DerainError: If the controller was trained with a different CLIP.
        """
        super().restore_metadata(metadata)
        self.words = metadata.get("words", self.words)
        expected = metadata.get("clip_sha256")
        if expected not in {None, self.clip_sha256}:
            raise DerainError(
                f"--model.clip {self.clip.name}: the controller was trained with a different CLIP; select that one by "
                "--model.clip or DERAIN_CLIP"
            )


def _text_id(text: str) -> int:
    """Return a 64-bit id of a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def random_crop(height: int, width: int, smallest: float) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop of an image, in pixels.

    Area and aspect ratio (from 3:4 to 4:3) are drawn until the crop fits into the image, at most ten times. If no crop
    fits, the largest centre crop with an aspect ratio in this range is returned.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        smallest: Minimum area of the crop, as a fraction of the image's area, in (0, 1].

    References:
        torchvision's ``RandomResizedCrop`` with its default ratios, as used by open_clip; with
        equal seeds, the crops are equal to those of torchvision.
    """
    narrowest, widest = 3 / 4, 4 / 3
    low, high = (float(value) for value in torch.tensor((narrowest, widest)).log())
    for _ in range(10):
        area = height * width * float(torch.empty(()).uniform_(smallest, 1))
        ratio = float(torch.empty(()).uniform_(low, high).exp())
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top = int(torch.randint(0, height - rows + 1, ()))
            left = int(torch.randint(0, width - columns + 1, ()))
            return top, left, rows, columns
    rows = min(height, round(width / narrowest))
    columns = min(width, round(height * widest))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def random_resized_crop(images: Float[Tensor, "b 3 h w"], smallest: float, side: int) -> Float[Tensor, "b 3 s s"]:
    """Return a random crop of each image, resized to a square by antialiased bicubic interpolation.

    Args:
        images: Images in [0, 1].
        smallest: Minimum area of the crop, see `random_crop`.
        side: Height and width s of the result, in pixels.
    """
    height, width = images.shape[2:]
    parts = []
    for image in images:
        top, left, rows, columns = random_crop(height, width, smallest)
        part = image[None, :, top : top + rows, left : left + columns]
        parts.append(F.interpolate(part, (side, side), mode="bicubic", antialias=True).clamp(0, 1))
    return torch.cat(parts)
