"""Frozen CLIP: found or fetched, loaded when first needed, and never part of a method's parameters."""

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
from derain.files.hub import HubModel, check_whole, loading
from derain.images import Pixels

log = logging.getLogger("derain")

PREPARATION = 2
"""Version of the preprocessing of images: cached features belong to one version."""


def clip_model(without: str) -> HubModel:
    """Return CLIP as a model of the hub, with the advice of its error messages.

    Args:
        without: How to work without CLIP; empty if that is impossible.
    """
    unfetched = "name a local directory by --model.clip or DERAIN_CLIP"
    if without:
        unfetched += f"; {without}"
    return HubModel(
        "CLIP",
        tokenizer=(("tokenizer.json",), ("vocab.json", "merges.txt")),
        option="--model.clip",
        instead=without or "set DERAIN_CLIP",
        unfetched=unfetched,
    )


def centre_view(height: int, width: int, shortest: int, crop: int) -> tuple[int, int, int, int]:
    """Return the size that an image is resized to and the position of its centre crop, as torchvision does.

    CLIP's authors and open_clip use torchvision, which rounds a margin of half a pixel to the even number; transformers
    rounds it down.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        shortest: Length of the shorter side after resizing.
        crop: Side of the centre crop.

    Returns:
        Height, width, top, left.

    Example:
        >>> centre_view(481, 321, 224, 224)  # a margin of 111 pixels
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
    """Image and text features of CLIP.

    It is not an ``nn.Module``, so that it is not part of checkpoints, optimisers and averages. It moves to the device
    of its inputs.

    Args:
        name: Id on the Hugging Face hub (``openai/clip-vit-base-patch32``) or a local directory in that form;
            ``$DERAIN_CLIP`` takes precedence, for weights that name a directory of another machine.
        without: How to work without CLIP, for error messages.

    Raises:
        DerainError: When CLIP is first needed and can neither be found nor fetched.
    """

    def __init__(self, name: str, without: str = "") -> None:
        self.hub = clip_model(without)
        self.name = os.environ.get("DERAIN_CLIP") or name
        if self.name != name:
            log.info("CLIP: %s (DERAIN_CLIP) instead of %s", self.name, name)

    @cached_property
    def folder(self) -> Path:
        """Directory of the model; it is fetched from the hub at the first access if necessary, with a log message."""
        return self.hub.folder(self.name)

    @cached_property
    def sha256(self) -> str:
        """Hash of weights, configuration and tokenizer."""
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
                ignore_mismatched_sizes=True,  # reported by check_whole
            )
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        model, loading_info = loaded
        check_whole("CLIP", self.name, loading_info)
        model.train(False)
        return model.requires_grad_(False), tokenizer, processor

    @property
    def model(self) -> Any:
        """Frozen model of transformers, on the CPU until it is moved."""
        return self._loaded[0]

    @property
    def side(self) -> int:
        """Side of CLIP's input images, in pixels."""
        return int(self._loaded[2].crop_size["height"])

    def _view(self, height: int, width: int) -> tuple[int, int, int, int]:
        return centre_view(height, width, self._loaded[2].size["shortest_edge"], self.side)

    def pixels(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """Return images at CLIP's input size and range, on their device.

        They are resized by antialiased bicubic interpolation, as by Pillow but in floating point, and cropped at the
        centre.

        Args:
            images: In [0, 1], of any size.
        """
        processor = self._loaded[2]
        height, width, top, left = self._view(*images.shape[2:])
        resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        resized = resized[:, :, top : top + self.side, left : left + self.side]
        mean = images.new_tensor(processor.image_mean)[:, None, None]
        std = images.new_tensor(processor.image_std)[:, None, None]
        return (resized - mean) / std

    def _cropped(self, image: Pixels) -> Pixels:
        height, width, top, left = self._view(*image.shape[:2])
        resized = Image.fromarray(image).resize((width, height), self._loaded[2].resample)
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str], *, truncate: bool = False) -> Float[Tensor, "n d"]:
        """Return features of texts, not normalised, on the CPU.

        Args:
            prompts: The texts.
            truncate: Truncate texts that are too long for CLIP, except for the end token, instead of refusing them.

        Raises:
            DerainError: If a text is too long for CLIP.
        """
        model, tokenizer, _ = self._loaded
        device = next(model.parameters()).device
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(
            list(prompts),
            padding=True,
            truncation=truncate,
            max_length=length if truncate else None,
            return_tensors="pt",
        )
        if tokens.input_ids.shape[1] > length:
            longest = max(prompts, key=len)
            raise DerainError(f"prompt {longest[:60]!r} …: too long; CLIP reads {length - 2} tokens; shorten it")
        with torch.autocast(device.type, enabled=False):
            pooled = model.text_model(**tokens.to(device)).pooler_output
            return model.text_projection(pooled).float().cpu()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def images(self, images: Sequence[Pixels], device: torch.device | None = None) -> Float[Tensor, "n d"]:
        """Return features of images of any sizes, not normalised, on the CPU.

        They are resized by Pillow's bicubic interpolation and cropped at the centre, as by CLIP's authors.
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
