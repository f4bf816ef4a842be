"""Choice of the route of each image."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from derain.errors import ArgumentError, DerainError
from derain.images import Pixels
from derain.methods.cliprpn.perception import RainPerception, scores

log = logging.getLogger("derain")


class Routing:
    """Chooses the route of each image by CLIP, or uses a fixed route for all images.

    Args:
        count: Number of routes.
        perception: Rain perception; None: all images take ``route``.
        route: Route of all images without perception.

    Attributes:
        clip_sha256: Hash of the CLIP that the weights were trained with; None: unknown.
        known: Routes of the training images by name; None: not computed.
        counts: Training samples of each route, as recorded in weights; None: unknown.

    Raises:
        DerainError: If the route does not exist.
    """

    def __init__(self, count: int, perception: RainPerception | None, route: int = 0) -> None:
        self.count, self.perception = count, perception
        self.clip_sha256: str | None = None
        self.known: dict[str, int] | None = None
        self.counts: Sequence[int] | None = None
        self._warned: set[int] = set()
        if perception is None:
            self.set_route(route)

    def set_route(self, route: int) -> None:
        """Use a fixed route for all images, instead of CLIP.

        Raises:
            DerainError: If the route does not exist.
        """
        last = max(1, self.count) - 1
        if not 0 <= route <= last:
            raise ArgumentError(f"route {route}: does not exist; expected a route from 0 to {last}")
        self.perception, self.route = None, route

    def check(self, resuming: bool = False) -> None:
        """Find or fetch CLIP, and compare it with the CLIP that the weights were trained with.

        Args:
            resuming: Whether a training run resumes: it must use the same CLIP, otherwise a warning is enough.

        Raises:
            DerainError: If CLIP is not available, or a run resumes with a different CLIP.
        """
        if self.perception is None:
            return
        clip = self.perception.clip
        if self.clip_sha256 not in {None, clip.sha256}:
            if resuming:
                raise DerainError(
                    f"cannot resume with CLIP {clip.name}: the run was started with a different one; name that one by "
                    "--model.clip or DERAIN_CLIP"
                )
            log.warning("these weights were trained with a CLIP other than %s: routes may differ", clip.name)
        self.clip_sha256 = clip.sha256

    def __call__(self, rainy: Float[Tensor, "b 3 h w"], remember: bool = True) -> dict[str, Any]:
        """Return the ``routes`` of images in [0, 1] and, with CLIP, their ``similarities`` to the prompts."""
        if self.perception is None:
            self.warn_untrained([self.route])
            return {"routes": [self.route] * len(rainy)}
        self.check()
        images = list((rainy.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        similarities = self.perception.all_similarities(images, rainy.device, remember)
        routes = similarities.argmax(1).tolist()
        self.warn_untrained(routes)
        return {"routes": routes, "similarities": similarities}

    def untrained(self, route: int) -> bool:
        """Return whether no training image took a route, as recorded in the weights."""
        return self.counts is not None and route < len(self.counts) and self.counts[route] == 0

    def warn_untrained(self, routes: Iterable[int]) -> None:
        """Log a warning for each untrained route, once."""
        untrained = {route for route in routes if self.untrained(route)}
        trained = [str(route) for route in range(self.count) if not self.untrained(route)]
        advice = f"; use --route {' or --route '.join(trained)}" if trained else ""
        for route in untrained - self._warned:
            self._warned.add(route)
            log.warning(
                "an image takes route %d, which no image took in training: expect a poor result%s", route, advice
            )

    def learn(self, names: Sequence[str], images: Iterable[Pixels], device: torch.device) -> None:
        """Compute the routes of the training images; their crops take the routes of the whole images."""
        if self.perception is None:
            return
        routes = self.perception.all_similarities(images, device).argmax(1)
        self.known = dict(zip(names, routes.tolist(), strict=True))
        counts = torch.bincount(routes, minlength=self.count).tolist()
        log.info("training images per route: %s", ", ".join(f"{count:,}" for count in counts))

    def describe(self, conditions: dict[str, Any], index: int) -> dict[str, Any]:
        """Return the route of an image of a batch, and its scores (eq. 1) by prompt."""
        if not conditions:
            return {}
        route = conditions["routes"][index]
        description: dict[str, Any] = {"route": route}
        if self.untrained(route):
            description["untrained"] = True
        if self.perception is not None and "similarities" in conditions:
            texts = self.perception.texts
            image_scores = scores(conditions["similarities"])[index].tolist()
            description["prompt"] = texts[route]
            description["scores"] = dict(zip(texts, image_scores, strict=True))
        return description
