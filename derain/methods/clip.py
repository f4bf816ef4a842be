"""Frozen CLIP: found or fetched, loaded when first needed, and never a part of a method's parameters."""

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
"""Version of the pixels that CLIP sees of an image: whatever is kept of features belongs to one."""


def clip_model(without: str) -> HubModel:
    """CLIP on the hub, and what is said when it cannot be had.

    Args:
        without: How to do without it, empty where that is not possible.
    """
    return HubModel(
        "CLIP",
        tokenizer=(("tokenizer.json",), ("vocab.json", "merges.txt")),
        option="--model.clip",
        instead=without or "set DERAIN_CLIP",
        unfetched="; ".join(("name a local directory by --model.clip or DERAIN_CLIP", *([without] if without else []))),
    )


def centre_view(height: int, width: int, shortest: int, crop: int) -> tuple[int, int, int, int]:
    """Return the size that an image is resized to and where its centre is cut out, as torchvision does.

    CLIP's authors and open_clip prepare images with torchvision, which rounds half a pixel of the margin to the even
    number; transformers rounds it down.

    Args:
        height: Of the image, in pixels.
        width: Likewise.
        shortest: Length of the shorter side after resizing.
        crop: Side of the square that is cut out.

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
    top, left = (round((side - crop) / 2) for side in (height, width))
    return height, width, top, left


class FrozenCLIP:
    """CLIP's image and text features.

    It is no ``nn.Module``, so that it enters no checkpoint, no optimiser and no average; it moves to the device of
    what it is asked for.

    Args:
        name: Id on the Hugging Face hub (``openai/clip-vit-base-patch32``) or a local directory in that form;
            ``$DERAIN_CLIP`` goes before it, for weights that name a directory of another machine.

        without: What a method that does without CLIP is told to do, for messages.

    Raises:
        DerainError: When it is first needed and can neither be found nor fetched.
    """

    def __init__(self, name: str, without: str = "") -> None:
        self.hub = clip_model(without)
        self.name = os.environ.get("DERAIN_CLIP") or name
        if self.name != name:
            log.info("CLIP: %s (DERAIN_CLIP) instead of %s", self.name, name)

    @cached_property
    def folder(self) -> Path:
        """Directory of the model; fetched from the hub, with a word about it, where it is not here yet."""
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
                ignore_mismatched_sizes=True,  # told below
            )
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        model, told = loaded
        check_whole("CLIP", self.name, told)
        model.train(False)
        return model.requires_grad_(False), tokenizer, processor

    @property
    def model(self) -> Any:
        """The model of transformers, frozen, on the CPU until it is moved."""
        return self._loaded[0]

    @property
    def side(self) -> int:
        """Side of the images that CLIP sees, in pixels."""
        return int(self._loaded[2].crop_size["height"])

    def _view(self, height: int, width: int) -> tuple[int, int, int, int]:
        return centre_view(height, width, self._loaded[2].size["shortest_edge"], self.side)

    def pixels(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """Return images in CLIP's size and range, on their device.

        The short side is resized by antialiased bicubic interpolation, as by Pillow but in floating point, the centre
        is cut out.

        Args:
            images: In [0, 1], of any size.
        """
        processor = self._loaded[2]
        height, width, top, left = self._view(*images.shape[2:])
        resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        resized = resized[:, :, top : top + self.side, left : left + self.side]
        mean, std = (images.new_tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        return (resized - mean) / std

    def _cropped(self, image: Pixels) -> Pixels:
        height, width, top, left = self._view(*image.shape[:2])
        resized = Image.fromarray(image).resize((width, height), self._loaded[2].resample)
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str], *, truncate: bool = False) -> Float[Tensor, "n d"]:
        """Features of texts, not normalised, on the CPU.

        Args:
            prompts: The texts.
            truncate: Cut what is longer than CLIP reads, all but its end token, instead of refusing it.
        """
        model, tokenizer, _ = self._loaded
        device = next(model.parameters()).device
        length = model.config.text_config.max_position_embeddings
        cut = {"truncation": True, "max_length": length} if truncate else {}
        tokens = tokenizer(list(prompts), padding=True, return_tensors="pt", **cut)
        if tokens.input_ids.shape[1] > length:
            longest = max(prompts, key=len)
            raise DerainError(f"prompt {longest[:60]!r} …: CLIP reads {length - 2} tokens at most; shorten it")
        with torch.autocast(device.type, enabled=False):
            pooled = model.text_model(**tokens.to(device)).pooler_output
            return model.text_projection(pooled).float().cpu()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def images(self, images: Sequence[Pixels], device: torch.device | None = None) -> Float[Tensor, "n d"]:
        """Return features of images of any sizes, not normalised, on the CPU.

        The images are resized to CLIP's size by bicubic interpolation with Pillow and cropped at the centre, as CLIP's
        authors do.
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
