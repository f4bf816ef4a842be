"""The methods, each a LightningModule with ``forward(rainy) -> derained``."""

from derain.methods.base import DerainModule
from derain.methods.cliprpn.module import CLIPRPNModule
from derain.methods.prenet.module import PReNetModule
from derain.methods.restormer.module import RestormerModule

METHODS: tuple[type[DerainModule], ...] = (CLIPRPNModule, RestormerModule, PReNetModule)
"""Every method; files of weights and tests look here."""

__all__ = ["METHODS", "CLIPRPNModule", "DerainModule", "PReNetModule", "RestormerModule"]
