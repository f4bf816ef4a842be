"""Base classes, and the methods as LightningModules: ``from derain.methods import PReNetModule`` imports one."""

from typing import Any

from derain.methods.base import DerainModule
from derain.methods.registry import built_in
from derain.methods.trainable import TrainableModule

__all__ = ["DerainModule", "TrainableModule"]


def __getattr__(name: str) -> Any:
    """Import a built-in method on first access."""
    return built_in(name)
