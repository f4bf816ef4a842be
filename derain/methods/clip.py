"""Frozen CLIP: found on disk or downloaded, loaded when first needed, and not part of a method's parameters."""

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from derain.errors import DerainError
from derain.files.hub import HubModelKind, check_complete, loading
from derain.files.metadata import shorten
from derain.images import Pixels

log = logging.getLogger("derain")

PREPROCESSING_VERSION = 2
"""Version of the image preprocessing, on which the name of the file of cached similarities depends."""


def clip_model(alternative: str) -> HubModelKind:
    """Return the `HubModelKind` of CLIP.

    Args:
        alternative: How to work without CLIP, for error messages; empty if that is impossible.
    """
    download_advice = "name a local directory by --model.clip or DERAIN_CLIP"
    if alternative:
        download_advice += f"; {alternative}"
    return HubModelKind(
        "CLIP",
        tokenizer=(("tokenizer.json",), ("vocab.json", "merges.txt")),
        option="--model.clip",
        naming_advice=alternative or "set DERAIN_CLIP",
        download_advice=download_advice,
    )


def resize_and_crop_geometry(height: int, width: int, shortest: int, crop: int) -> tuple[int, int, int, int]:
    """Return the size after resizing and the position of the centre crop, as torchvision computes them.

    CLIP's authors and open_clip use torchvision. Unlike transformers, torchvision rounds a position that ends in .5 to
    the nearest even number.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        shortest: Length of the shorter side after resizing, in pixels.
        crop: Side of the square centre crop, in pixels.

    Returns:
        Height and width after resizing; top and left of the crop.

    Example:
        >>> resize_and_crop_geometry(481, 321, 224, 224)  # top: (335 - 224) / 2 = 55.5, rounded to 56
        (335, 224, 56, 0)
    """
    if height <= width:
        height, width = shortest, shortest * width // height
    else:
        height, width = shortest * height // width, shortest
    top = round((height - crop) / 2)
    left = round((width - crop) / 2)
    return height, width, top, left


class FrozenCLIP:
    """Image and text features of a frozen CLIP.

    It is not an ``nn.Module``, so checkpoints, optimisers and EMA weights do not include it. The model stays on the CPU
    until `image_features` or the caller moves it.

    Args:
        name: Id on the Hugging Face hub (``openai/clip-vit-base-patch32``) or a local directory with the same files.
            ``$DERAIN_CLIP`` takes precedence, since weights may record a directory of another machine.
        alternative: How to work without CLIP, for error messages; empty if that is impossible.

    Raises:
        DerainError: On first use, if CLIP is incomplete or damaged, or can be neither found nor downloaded.
    """

    def __init__(self, name: str, alternative: str = "") -> None:
        self.hub = clip_model(alternative)
        self.name = os.environ.get("DERAIN_CLIP") or name
        if self.name != name:
            log.info("CLIP: %s (DERAIN_CLIP) instead of %s", self.name, name)

    @cached_property
    def folder(self) -> Path:
        """Directory of the model; on first access, downloaded from the hub if necessary, with a log message."""
        return self.hub.folder(self.name)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the files of weights, configuration and tokenizer."""
        return self.hub.sha256(self.folder)

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        folder = self.folder
        with loading("CLIP", self.name):
            loaded: Any = CLIPModel.from_pretrained(
                folder,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by check_complete
            )
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        model, loading_info = loaded
        check_complete("CLIP", self.name, loading_info)
        model.train(False)
        return model.requires_grad_(False), tokenizer, processor

    @property
    def model(self) -> Any:
        """Frozen ``CLIPModel`` of transformers, in float32, on the CPU until it is moved."""
        return self._loaded[0]

    @property
    def side(self) -> int:
        """Side of CLIP's square input images, in pixels."""
        return int(self._loaded[2].crop_size["height"])

    def _geometry(self, height: int, width: int) -> tuple[int, int, int, int]:
        return resize_and_crop_geometry(height, width, self._loaded[2].size["shortest_edge"], self.side)

    def pixels(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """Return images resized, cropped at the centre and normalised for CLIP, on the same device.

        Resizing is antialiased bicubic interpolation, as in Pillow, but in floating point. Channels are normalised by
        CLIP's mean and standard deviation.

        Args:
            images: Images in [0, 1], of any size.

        Returns:
            ``(b, 3, side, side)``, see `side`.
        """
        processor = self._loaded[2]
        height, width, top, left = self._geometry(*images.shape[2:])
        resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        resized = resized[:, :, top : top + self.side, left : left + self.side]
        mean = images.new_tensor(processor.image_mean)[:, None, None]
        std = images.new_tensor(processor.image_std)[:, None, None]
        return (resized - mean) / std

    def _cropped(self, image: Pixels) -> Pixels:
        height, width, top, left = self._geometry(*image.shape[:2])
        resized = Image.fromarray(image).resize((width, height), self._loaded[2].resample)
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str], *, truncate: bool = False) -> Float[Tensor, "n d"]:
        """Return features of texts, not normalised, on the CPU.

        Args:
            texts: The texts.
            truncate: Whether to shorten texts that are too long for CLIP.

        Raises:
            DerainError: If a text is too long for CLIP and ``truncate`` is false.
        """
        model, tokenizer, _ = self._loaded
        device = next(model.parameters()).device
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(
            list(texts),
            padding=True,
            truncation=truncate,
            max_length=length if truncate else None,
            return_tensors="pt",
        )
        counts = tokens.attention_mask.sum(1)
        if counts.max() > length:  # start and end token included
            longest, count = shorten(texts[int(counts.argmax())], 60), int(counts.max()) - 2
            raise DerainError(
                f"prompt {longest!r}: {count} tokens; CLIP accepts at most {length - 2} tokens; shorten it"
            )
        with torch.autocast(device.type, enabled=False):
            pooled = model.text_model(**tokens.to(device)).pooler_output
            return model.text_projection(pooled).float().cpu()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def image_features(self, images: Sequence[Pixels], device: torch.device | None = None) -> Float[Tensor, "n d"]:
        """Return features of images, not normalised, on the CPU; the images are processed as a single batch.

        Images are resized by Pillow's bicubic interpolation and cropped at the centre, as by CLIP's authors.

        Args:
            images: RGB images ``(h, w, 3)``, uint8, of any sizes.
            device: Device that CLIP is moved to; by default the CPU.
        """
        model, _, processor = self._loaded
        model.to(device or "cpu")
        pixels = processor(
            [self._cropped(image) for image in images],
            do_resize=False,
            do_center_crop=False,
            input_data_format="channels_last",
            return_tensors="pt",
        ).pixel_values.to(device or "cpu")
        with torch.autocast(pixels.device.type, enabled=False):
            pooled = model.vision_model(pixel_values=pixels).pooler_output
            return model.visual_projection(pooled).float().cpu()  # type: ignore[no-any-return]
