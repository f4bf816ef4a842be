"""What derain ships: ``NAME.safetensors``, and ``NAME.md``, which says where it comes from."""

from pathlib import Path


def in_the_box() -> dict[str, Path]:
    """The weights that derain ships, by name."""
    return {file.stem: file for file in sorted(Path(__file__).parent.glob("*.safetensors"))}
