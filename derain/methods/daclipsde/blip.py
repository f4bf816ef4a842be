"""Frozen BLIP: captions of clean images."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from derain.errors import DerainError
from derain.files.hub import HubModelKind, check_complete, loading
from derain.images import Pixels

BLIP = HubModelKind(
    "BLIP",
    tokenizer=(("tokenizer.json",), ("vocab.txt",)),
    option="--captioner",
    naming_advice="caption without a model (--captioner template)",
    download_advice="name a local directory by --captioner; without a model: --captioner template",
)


class FrozenBLIP:
    """BLIP captioning model of transformers.

    Decoding is greedy, without random sampling.

    Args:
        name: Id on the Hugging Face hub (``Salesforce/blip-image-captioning-large``) or a local directory with
            the same files.
        max_tokens: Maximum length of a caption, in tokens.

    Raises:
        DerainError: On first use, if BLIP is incomplete or damaged, can be neither found nor downloaded, or cannot
            write captions of ``max_tokens`` tokens.
    """

    def __init__(self, name: str, max_tokens: int = 32) -> None:
        self.name, self.max_tokens = name, max_tokens

    @cached_property
    def folder(self) -> Path:
        """Directory of the model; on first access, downloaded from the hub if necessary, with a log message."""
        return BLIP.folder(self.name)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the files of weights, configuration and tokenizer."""
        return BLIP.sha256(self.folder)

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

        folder = self.folder
        with loading("BLIP", self.name):
            loaded: Any = BlipForConditionalGeneration.from_pretrained(
                folder,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by check_complete
            )
            tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
            processor = BlipImageProcessorPil.from_pretrained(folder, local_files_only=True)
        model, loading_info = loaded
        check_complete("BLIP", self.name, loading_info)
        longest = model.config.text_config.max_position_embeddings - 1
        if self.max_tokens > longest:
            raise DerainError(f"--max-tokens {self.max_tokens}: expected at most {longest} for {self.name}; use fewer")
        model.train(False)
        return model.requires_grad_(False), tokenizer, processor

    @torch.inference_mode()
    def captions(self, images: Sequence[Pixels], device: torch.device | None = None) -> list[str]:
        """Return one caption per image; the images are processed as a single batch.

        Args:
            images: Images ``(h, w, 3)`` in uint8, of any sizes.
            device: Device that BLIP is moved to; by default the CPU.

        Raises:
            DerainError: If the batch does not fit into the memory of the device.
        """
        model, tokenizer, processor = self._loaded
        try:
            model.to(device or "cpu")
            pixels = processor(list(images), input_data_format="channels_last", return_tensors="pt").pixel_values
            tokens = model.generate(
                pixels.to(device or "cpu"), max_new_tokens=self.max_tokens, do_sample=False, num_beams=1
            )
        except torch.OutOfMemoryError as error:
            raise DerainError(
                f"--batch-size {len(images)}: the images do not fit into the memory of {device}; use a smaller batch"
            ) from error
        captions = tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True, clean_up_tokenization_spaces=True)
        return [caption.strip() for caption in captions]
