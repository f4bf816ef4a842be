"""Bundled models: weights ``NAME.safetensors`` with a model card ``NAME.md``."""

from pathlib import Path


def bundled() -> dict[str, Path]:
    """Return the weights files of the bundled models by name."""
    return {file.stem: file for file in sorted(Path(__file__).parent.glob("*.safetensors"))}
