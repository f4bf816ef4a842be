"""Pretrained networks of torchvision, whose features LPIPS and the perceptual loss compare."""

import importlib.util
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from derain.errors import DerainError


class Backbone(NamedTuple):
    """Pretrained network of torchvision.

    Attributes:
        name: Name of the network in messages.
        url: URL of the weights.
        megabytes: Size of the weights file in MiB, which torchvision and messages call MB.
        min_side: Smallest height and width of the images that LPIPS accepts with the network, in pixels.
    """

    name: str
    url: str
    megabytes: int
    min_side: int

    @property
    def file(self) -> Path:
        """Path of the weights in the cache of ``torch.hub``."""
        cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        home = Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser()
        return home / "hub" / "checkpoints" / self.url.rpartition("/")[2]

    @contextmanager
    def loading(self, purpose: str, *, instead: str = "") -> Iterator[None]:
        """Return a context for loading the weights by torchvision, which downloads them if they are not in the cache.

        Before a download, a line on standard error states size, source and file.

        Args:
            purpose: What needs the weights, for messages.
            instead: Option that downloads the weights. With such an option, missing weights are an error that
                names the option; by default, they are downloaded.

        Raises:
            DerainError: If torchvision is not installed, or the weights are damaged, cannot be downloaded, or are
                missing although ``instead`` is given.
        """
        weights = f"{self.name} weights ({self.megabytes} MB, {self.url})"
        if importlib.util.find_spec("torchvision") is None:
            raise DerainError(f"{purpose} needs torchvision; install it with: pip install 'derain[lpips]'")
        if not self.file.is_file():
            if instead:
                raise DerainError(f"{purpose} needs {weights}; {instead} downloads them to {self.file}")
            print(f"{purpose}: downloading {weights} to {self.file}", file=sys.stderr)
        try:
            with redirect_stdout(sys.stderr):  # torch.hub prints its progress
                yield
        except (OSError, EOFError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if self.file.is_file():
                raise DerainError(f"{self.file}: damaged ({reason}); delete it and try again") from error
            raise DerainError(f"cannot download {weights}: {reason}; save them to {self.file}") from error


BACKBONES = {
    "alex": Backbone("AlexNet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", 233, 31),
    "vgg": Backbone("VGG16", "https://download.pytorch.org/models/vgg16-397923af.pth", 528, 16),
}
"""Networks by their names in LPIPS."""
