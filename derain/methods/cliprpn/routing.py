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
    """Choice of a route for each image: by CLIP, or the same route for all images.

    Args:
        count: Number of routes; 0 for a network without routes, in which all images take route 0.
        perception: Rain perception that chooses routes; None: all images take ``route``.
        route: Index of the route of all images, from 0; ignored if ``perception`` is given.

    Attributes:
        clip_sha256: Hash of the CLIP that chose the routes in the training of the weights; after `check`, that of the
            present CLIP. None: no CLIP, or unknown.
        training_routes: Routes of the training images by name; None: not computed.
        sample_counts: Number of training samples of each route, as recorded in the weights; None: unknown.

    Raises:
        ArgumentError: If the route does not exist.
    """

    def __init__(self, count: int, perception: RainPerception | None, route: int = 0) -> None:
        self.count, self.perception = count, perception
        self.clip_sha256: str | None = None
        self.training_routes: dict[str, int] | None = None
        self.sample_counts: Sequence[int] | None = None
        self._warned: set[int] = set()
        if perception is None:
            self.set_route(route)

    def set_route(self, route: int) -> None:
        """Use the same route for all images, without CLIP.

        Args:
            route: Index of the route, from 0.

        Raises:
            ArgumentError: If the route does not exist.
        """
        last = max(1, self.count) - 1
        if not 0 <= route <= last:
            raise ArgumentError(f"route {route}: does not exist; expected a route from 0 to {last}")
        self.perception, self.route = None, route

    def check(self, resuming: bool = False) -> None:
        """Find or download CLIP, compare its hash with ``clip_sha256``, and store it there.

        If all images take the same route, do nothing.

        Args:
            resuming: Whether a different hash is an error, as in a resumed run; otherwise a warning is logged.

        Raises:
            DerainError: If CLIP is not available, or is a different one and ``resuming`` is true.
        """
        if self.perception is None:
            return
        clip = self.perception.clip
        if self.clip_sha256 not in {None, clip.sha256}:
            if resuming:
                raise DerainError(
                    f"cannot resume with CLIP {clip.name}: the run was started with a different one; select that one "
                    "by --model.clip or DERAIN_CLIP"
                )
            log.warning(
                "these weights were trained with a CLIP other than %s: routes may differ; set DERAIN_CLIP to the right "
                "one",
                clip.name,
            )
        self.clip_sha256 = clip.sha256

    def __call__(self, rainy: Float[Tensor, "b 3 h w"], cache: bool = True) -> dict[str, Any]:
        """Return the routes of images.

        Args:
            rainy: Rainy images; they are clamped to [0, 1] and rounded to 8 bit for CLIP.
            cache: Whether to add the similarities to the cache on disk.

        Returns:
            ``routes``, the index of each image's route; and ``similarities`` to the prompts, ``(b, n)``, if CLIP
            chose the routes.

        Raises:
            DerainError: If CLIP is needed and not available.
        """
        if self.perception is None:
            self.warn_untrained([self.route])
            return {"routes": [self.route] * len(rainy)}
        self.check()
        images = list((rainy.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        similarities = self.perception.all_similarities(images, rainy.device, cache)
        routes = similarities.argmax(1).tolist()
        self.warn_untrained(routes)
        return {"routes": routes, "similarities": similarities}

    def untrained(self, route: int) -> bool:
        """Return whether the weights record that no training sample took a route; False if they record no counts."""
        counts = self.sample_counts
        return counts is not None and route < len(counts) and counts[route] == 0

    def warn_untrained(self, routes: Iterable[int]) -> None:
        """Log a warning about each untrained route; only one per route."""
        untrained = {route for route in routes if self.untrained(route)}
        trained = [str(route) for route in range(self.count) if not self.untrained(route)]
        advice = f"; use --route {' or --route '.join(trained)}" if trained else ""
        for route in untrained - self._warned:
            self._warned.add(route)
            log.warning("route %d is untrained: no training image took it; expect a poor result%s", route, advice)

    def compute_training_routes(self, names: Sequence[str], images: Iterable[Pixels], device: torch.device) -> None:
        """Compute ``training_routes``, the routes of whole training images.

        If all images take the same route, do nothing.

        Args:
            names: Names of the images.
            images: Images ``(h, w, 3)`` in uint8.
            device: Device of CLIP.
        """
        if self.perception is None:
            return
        routes = self.perception.all_similarities(images, device).argmax(1)
        self.training_routes = dict(zip(names, routes.tolist(), strict=True))
        counts = torch.bincount(routes, minlength=self.count).tolist()
        log.info("training images per route: %s", ", ".join(f"{count:,}" for count in counts))

    def describe(self, conditions: dict[str, Any], index: int) -> dict[str, Any]:
        """Return a description of the route of an image.

        Args:
            conditions: Result of calling this object for a batch, or an empty dictionary.
            index: Index of the image in the batch.

        Returns:
            ``route``: the index of the route. ``untrained``: true; present only if no training sample took the route.
            ``prompt``, and ``scores`` (eq. 1) by prompt: present only if CLIP chose the route. Empty if ``conditions``
            is empty.
        """
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
