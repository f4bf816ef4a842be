"""Interfaces of methods with routes, sampling or explanations, and of diffusions whose network can be exported.

Commands and `Restorer` test for an interface by ``isinstance``.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from derain.errors import ArgumentError


class Routed(ABC):
    """Interface of methods that send each image along one of several routes.

    Methods should log a warning if an image takes a route that was not trained.
    """

    @abstractmethod
    def set_route(self, route: int) -> None:
        """Send all images along one route.

        Args:
            route: Index of the route, from 0.

        Raises:
            ArgumentError: If there is no such route.
        """


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling options of a method, which are not part of weights files.

    Args:
        solver: Name of a solver; None: the default solver of the method. Solvers of DA-CLIP + IR-SDE: ``posterior``
            (default, as in the code of IR-SDE's authors), ``sde`` (Euler-Maruyama), ``ode`` (Euler), and the
            semi-analytic ``mrs-ode1``, ``mrs-ode2``, ``mrs-sde2``, ``mars-ode2`` and ``mars-sde2``.
        steps: Number of steps, with one evaluation of the network each; at most the number of steps of the method's
            schedule. None: all steps of the schedule.
        seed: Seed of the noise. All images of equal size receive the same noise, in any batch.

    Raises:
        ArgumentError: If the number of steps is below 1.
    """

    solver: str | None = None
    steps: int | None = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ArgumentError(f"steps {self.steps}: must be at least 1")


class Sampled(ABC):
    """Interface of methods that restore images in many steps, such as diffusions.

    ``forward`` accepts two more keyword arguments, both functions: ``tiled(image, function)`` applies a function to an
    image, as a whole or tile by tile, and is called at every step; ``show(steps, total)`` iterates over the steps and
    reports progress.

    Attributes:
        sampling: Current options, whose ``solver`` is not None.
    """

    sampling: Sampling

    @abstractmethod
    def set_sampling(self, sampling: Sampling) -> None:
        """Set solver, number of steps and seed.

        Raises:
            ArgumentError: If the method has no such solver, or its schedule has fewer steps.
        """


class Explains(ABC):
    """Interface of methods that explain a restoration.

    Attributes:
        maps: Names of the maps that `explain` returns after the derained image, in order.
        explaining: Whether ``predict_step`` returns the maps too.
    """

    maps: tuple[str, ...] = ()
    explaining: bool = False

    @abstractmethod
    def explain(self, rainy: Float[Tensor, "b 3 h w"], **conditions: Any) -> Float[Tensor, "b n h w"]:
        """Return derained images, followed by one channel in [0, 1] for each of the ``maps``: ``n = 3 + len(maps)``.

        Args:
            rainy: Rainy images in [0, 1].
            **conditions: Result of ``encode``; if there are none, `explain` encodes the images itself.
        """

    def describe_image(self, conditions: dict[str, Any], index: int) -> dict[str, Any]:
        """Return findings about one image that JSON can represent, such as its route; empty by default.

        Args:
            conditions: Result of ``encode`` for a batch.
            index: Index of the image in the batch.
        """
        return {}


class RunsGraph(ABC):
    """Interface of diffusions whose exported graph is the network; a restoration runs the graph once per step.

    The inputs of the graph are ``state``, ``rainy`` and ``times`` in this order, then optionally ``content`` and
    ``degradation``. The last two are vectors whose length is the hyper-parameter ``context``. Graphs of all other
    methods have one input, ``rainy``.
    """

    @classmethod
    @abstractmethod
    def from_graph(cls, metadata: Mapping[str, Any], network: nn.Module, inputs: list[str]) -> Any:
        """Return the method with an exported graph in place of its network, in eval mode.

        Args:
            metadata: Metadata of the file.
            network: Module that runs the graph. It accepts the first inputs by position, and the others by name.
            inputs: Names of the inputs.

        Raises:
            ValueError: If the inputs do not fit the metadata.
        """
