"""The methods, each a LightningModule with ``forward(rainy) -> derained``."""

from derain.methods.base import DerainModule
from derain.methods.cliprpn.module import CLIPRPNModule
from derain.methods.daclipsde.daclip import DACLIPModule
from derain.methods.daclipsde.module import DACLIPSDEModule
from derain.methods.described import DescribedModule
from derain.methods.plnlingan.module import PLNLINGANModule
from derain.methods.prenet.module import PReNetModule
from derain.methods.restormer.module import RestormerModule

METHODS: tuple[type[DerainModule], ...] = (
    CLIPRPNModule,
    DACLIPSDEModule,
    PLNLINGANModule,
    RestormerModule,
    PReNetModule,
)
"""Every method that restores; files of weights and tests look here."""

__all__ = [
    "METHODS",
    "CLIPRPNModule",
    "DACLIPModule",
    "DACLIPSDEModule",
    "DerainModule",
    "DescribedModule",
    "PLNLINGANModule",
    "PReNetModule",
    "RestormerModule",
]
