"""The methods, each a LightningModule with ``forward(rainy) -> derained``."""

from derain.methods.base import DerainModule
from derain.methods.prenet.module import PReNetModule

METHODS: tuple[type[DerainModule], ...] = (PReNetModule,)
"""Every method; files of weights and tests look here."""

__all__ = ["METHODS", "DerainModule", "PReNetModule"]
