"""Single-image rain removal with PyTorch Lightning.

``from derain import Restorer, RainDataModule, PReNetModule``: public names are imported on first use, so that
``import derain`` and the command line start quickly.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from derain.data.datamodule import RainDataModule as RainDataModule
    from derain.methods import AirNetModule as AirNetModule
    from derain.methods import CLIPRPNModule as CLIPRPNModule
    from derain.methods import DACLIPModule as DACLIPModule
    from derain.methods import DACLIPSDEModule as DACLIPSDEModule
    from derain.methods import DerainModule as DerainModule
    from derain.methods import PLNLINGANModule as PLNLINGANModule
    from derain.methods import PReNetModule as PReNetModule
    from derain.methods import RegressionModule as RegressionModule
    from derain.methods import RestormerModule as RestormerModule
    from derain.methods import SSIDKDModule as SSIDKDModule
    from derain.methods import Syn2RealModule as Syn2RealModule
    from derain.restoration import Restorer as Restorer

__version__ = "0.1.0"

_MODULES = {
    "AirNetModule": "derain.methods",
    "CLIPRPNModule": "derain.methods",
    "DACLIPModule": "derain.methods",
    "DACLIPSDEModule": "derain.methods",
    "DerainModule": "derain.methods",
    "PLNLINGANModule": "derain.methods",
    "PReNetModule": "derain.methods",
    "RegressionModule": "derain.methods",
    "RestormerModule": "derain.methods",
    "SSIDKDModule": "derain.methods",
    "Syn2RealModule": "derain.methods",
    "RainDataModule": "derain.data.datamodule",
    "Restorer": "derain.restoration",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    """Return a public name; its module is imported on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'derain' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
