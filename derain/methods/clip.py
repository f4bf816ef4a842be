"""Frozen CLIP: found or fetched, loaded when first needed, and never a part of a method's parameters."""

import hashlib
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from derain.errors import DerainError
from derain.images import Pixels

log = logging.getLogger("derain")

FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt")
"""What stands beside the weights; of the tokenizer, one form suffices."""


class FrozenCLIP:
    """CLIP's image and text features.

    It is no ``nn.Module``, so that it enters no checkpoint, no optimiser and no average; it moves to the device of
    what it is asked for.

    Args:
        name: Id on the Hugging Face hub (``openai/clip-vit-base-patch32``) or a local directory in that form;
            ``$DERAIN_CLIP`` goes before it, for weights that name a directory of another machine.

    Raises:
        DerainError: When it is first needed and can neither be found nor fetched.
    """

    def __init__(self, name: str) -> None:
        self.name = os.environ.get("DERAIN_CLIP") or name
        if self.name != name:
            log.info("CLIP: %s (DERAIN_CLIP) instead of %s", self.name, name)

    @cached_property
    def folder(self) -> Path:
        """Directory of the model; fetched from the hub, with a word about it, where it is not here yet."""
        path = Path(self.name).expanduser()
        if path.is_dir():
            if not _complete(path):
                raise DerainError(
                    f"{path}: no CLIP in this directory (expected config.json, preprocessor_config.json, "
                    "tokenizer.json or vocab.json and merges.txt, model.safetensors or pytorch_model.bin)"
                )
            return path
        return _from_hub(self.name)

    @cached_property
    def sha256(self) -> str:
        """Hash of weights, configuration and tokenizer."""
        whole = hashlib.sha256()
        for path in (_weights(self.folder), *(self.folder / name for name in FILES)):
            if path and path.is_file():
                with path.open("rb") as file:
                    whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        folder = self.folder
        try:
            loaded: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            raise DerainError(
                f"{self.name}: cannot be loaded as CLIP ({' '.join(str(error).split())[:200]})"
            ) from error
        model, told = loaded
        lacking = [*told["missing_keys"], *told["mismatched_keys"]]
        if lacking:  # transformers would fill them with random numbers
            raise DerainError(
                f"{self.name}: its weights lack {len(lacking)} parts of CLIP (as {lacking[0]}); fetch them anew"
            )
        model.train(False)
        return model.requires_grad_(False), tokenizer, processor

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Features of texts, not normalised, on the CPU."""
        model, tokenizer, _ = self._loaded
        device = next(model.parameters()).device
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(list(prompts), padding=True, return_tensors="pt")
        if tokens.input_ids.shape[1] > length:
            longest = max(prompts, key=len)
            raise DerainError(f"prompt {longest[:60]!r} …: CLIP reads {length - 2} tokens at most; shorten it")
        with torch.autocast(device.type, enabled=False):
            pooled = model.text_model(**tokens.to(device)).pooler_output
            return model.text_projection(pooled).float().cpu()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def images(self, images: Sequence[Pixels], device: torch.device | None = None) -> Float[Tensor, "n d"]:
        """Features of images of any sizes, not normalised, on the CPU.

        They are resized to CLIP's size by bicubic interpolation with Pillow and cropped at the centre, as CLIP's
        authors do.
        """
        model, _, processor = self._loaded
        model.to(device or "cpu")
        pixels = processor(list(images), input_data_format="channels_last", return_tensors="pt").pixel_values.to(
            device or "cpu"
        )
        with torch.autocast(pixels.device.type, enabled=False):
            pooled = model.vision_model(pixel_values=pixels).pooler_output
            return model.visual_projection(pooled).float().cpu()  # type: ignore[no-any-return]


def _weights(folder: Path) -> Path | None:
    return next((folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()), None)


def _from_hub(name: str) -> Path:
    """Directory of a hub's model; says what it fetches, from where and how big, before it does."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

    try:
        here = Path(snapshot_download(name, local_files_only=True))
        if _complete(here):
            return here  # else a download was interrupted: it goes on below
    except HFValidationError as error:
        raise DerainError(
            f"--model.clip {name}: neither a directory nor an id on the Hugging Face hub like OWNER/NAME; give one, "
            "or train without CLIP (--model.perception none)"
        ) from error
    except LocalEntryNotFoundError:
        pass
    try:
        files = {f.rfilename: f.size or 0 for f in HfApi().model_info(name, files_metadata=True).siblings or ()}
        weights = "model.safetensors" if "model.safetensors" in files else "pytorch_model.bin"
        wanted = [file for file in (weights, *FILES) if file in files]
        size = sum(files[file] for file in wanted) / 1e6
        log.info("fetching CLIP %s (%.0f MB) from %s into %s", name, size, constants.ENDPOINT, constants.HF_HUB_CACHE)
        here = Path(snapshot_download(name, allow_patterns=wanted))
    except (NetworkError, LocalEntryNotFoundError, OSError) as error:
        raise DerainError(
            f"CLIP {name}: not in {constants.HF_HUB_CACHE} and cannot be fetched from {constants.ENDPOINT} "
            f"({type(error).__name__}); fetch it beforehand where there is a network by `hf download {name}` and copy "
            "that folder, or name a local directory by --model.clip or DERAIN_CLIP; train without it by "
            "--model.perception none, restore without it by --route N"
        ) from error
    if not _complete(here):
        raise DerainError(
            f"CLIP {name}: {constants.ENDPOINT} has not all files of a CLIP under this name; give another"
        )
    return here


def _complete(folder: Path) -> bool:
    here = {path.name for path in folder.iterdir()}
    tokenizer = "tokenizer.json" in here or {"vocab.json", "merges.txt"} <= here
    return {"config.json", "preprocessor_config.json"} <= here and tokenizer and _weights(folder) is not None
