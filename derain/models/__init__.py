"""Models by name: bundled weights ``NAME.safetensors`` with a card ``NAME.md``, and weights on Hugging Face."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PublicModel:
    """Weights that other people publish on the Hugging Face hub.

    Attributes:
        hub: Repository, ``OWNER/NAME``.
        file: Name of the weights file in the repository.
        method: The network and its size, for display.
        licence: Licence of the weights.
        trained_on: Names of the training sets.
        sha256: SHA-256 of the file in hexadecimal; None if no hash is recorded.
        published: Results that the publisher reports: PSNR in dB and SSIM, by data set.
    """

    hub: str
    file: str
    method: str
    licence: str
    trained_on: tuple[str, ...]
    sha256: str | None = None
    published: dict[str, list[float]] = field(default_factory=dict)


def bundled() -> dict[str, Path]:
    """Return the weights files of the bundled models, by name."""
    return {file.stem: file for file in sorted(Path(__file__).parent.glob("*.safetensors"))}


@cache
def public() -> dict[str, PublicModel]:
    """Return the models of ``public.yaml``, by name."""
    import yaml  # not needed by most commands

    text = Path(__file__).with_name("public.yaml").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {name: PublicModel(**{**entry, "trained_on": tuple(entry["trained_on"])}) for name, entry in entries.items()}
