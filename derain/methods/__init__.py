"""The methods, each a LightningModule with ``forward(rainy) -> derained``; imported when first used."""

from typing import Any

from derain.methods.base import DerainModule
from derain.methods.registry import built_in
from derain.methods.trainable import TrainableModule

__all__ = ["DerainModule", "TrainableModule"]


def __getattr__(name: str) -> Any:
    """Import a method of derain when it is first used."""
    return built_in(name)
