"""Which route an image takes."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from derain.errors import DerainError
from derain.images import Pixels
from derain.methods.cliprpn.perception import RainPerception, scores

log = logging.getLogger("derain")


class Routing:
    """Chooses routes by CLIP, or takes one for all images.

    Args:
        count: How many routes there are.
        perception: Chooses; None: all images take ``route``.
        route: The route of all images without perception.

    Attributes:
        clip_sha256: The CLIP that weights were trained with, once it is known.
        known: Routes of the training images by name, once they were perceived.
        counts: Training samples of each route, as a file of weights records them; None: not known.

    Raises:
        DerainError: If there is no such route.
    """

    def __init__(self, count: int, perception: RainPerception | None, route: int = 0) -> None:
        self.count, self.perception = count, perception
        self.clip_sha256: str | None = None
        self.known: dict[str, int] | None = None
        self.counts: Sequence[int] | None = None
        self._warned: set[int] = set()
        if perception is None:
            self.take(route)

    def take(self, route: int) -> None:
        """Lets all images take one route, whatever CLIP would say.

        Raises:
            DerainError: If there is no such route.
        """
        if not 0 <= route < max(1, self.count):
            raise DerainError(f"route {route}: there are routes 0 to {max(1, self.count) - 1}; choose one of them")
        self.perception, self.route = None, route

    def check(self, resuming: bool = False) -> None:
        """Finds or fetches CLIP, and compares it with the one that the weights were trained with.

        Raises:
            DerainError: If CLIP cannot be had, or is another one than a resumed run began with.
        """
        if self.perception is None:
            return
        clip = self.perception.clip
        if self.clip_sha256 not in {None, clip.sha256}:
            if resuming:
                raise DerainError(f"{clip.name}: not the CLIP that this run began with; give that one")
            log.warning("these weights were trained with another CLIP than %s: routes may differ", clip.name)
        self.clip_sha256 = clip.sha256

    def __call__(self, rainy: Float[Tensor, "b 3 h w"], remember: bool = True) -> dict[str, Any]:
        """Routes of images in [0, 1], and with CLIP their similarities to the prompts."""
        if self.perception is None:
            self.warn_untrained([self.route])
            return {"routes": [self.route] * len(rainy)}
        self.check()
        images = list((rainy.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        found = self.perception.all_similarities(images, rainy.device, remember)
        routes = found.argmax(1).tolist()
        self.warn_untrained(routes)
        return {"routes": routes, "similarities": found}

    def untrained(self, route: int) -> bool:
        """Whether no image took a route in training, as far as the weights record it."""
        return self.counts is not None and route < len(self.counts) and self.counts[route] == 0

    def warn_untrained(self, routes: Iterable[int]) -> None:
        """Warn, once a route, if an image takes a route that no image took in training."""
        for route in {route for route in routes if self.untrained(route)} - self._warned:
            self._warned.add(route)
            trained = [str(other) for other in range(self.count) if not self.untrained(other)]
            log.warning(
                "an image takes route %d, which no image took in training: expect a poor result%s",
                route,
                f"; use --route {' or --route '.join(trained)}" if trained else "",
            )

    def learn(self, names: Sequence[str], images: Iterable[Pixels], device: torch.device) -> None:
        """Perceives the training images; their crops take the routes of the whole images."""
        if self.perception is None:
            return
        routes = self.perception.all_similarities(images, device).argmax(1)
        self.known = dict(zip(names, routes.tolist(), strict=True))
        counts = torch.bincount(routes, minlength=self.count).tolist()
        log.info("training images a route: %s", ", ".join(f"{count:,}" for count in counts))

    def describe(self, perceived: dict[str, Any], place: int) -> dict[str, Any]:
        """The route of an image of a batch, and its scores (eq. 1) by prompt."""
        if not perceived:
            return {}
        told: dict[str, Any] = {"route": perceived["routes"][place]}
        if self.untrained(told["route"]):
            told["untrained"] = True
        if self.perception is not None and "similarities" in perceived:
            shares = scores(perceived["similarities"])[place].tolist()
            told["prompt"] = self.perception.texts[told["route"]]
            told["scores"] = dict(zip(self.perception.texts, shares, strict=True))
        return told
