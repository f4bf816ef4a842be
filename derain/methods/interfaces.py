"""Interfaces of methods that do more than `DerainModule`: choose routes, sample, explain restorations.

Commands and the `Restorer` ask for these interfaces by ``isinstance``, never for a method.
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

    A method logs a warning when an image takes a route that was not trained.
    """

    @abstractmethod
    def set_route(self, route: int) -> None:
        """Send all images along one route.

        Raises:
            ArgumentError: If there is no such route.
        """


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a method samples images; an inference option, not part of weights files.

    Args:
        solver: Name of a solver of the method; None: the method's own choice. Those of DA-CLIP + IR-SDE:
            ``posterior`` (default, IR-SDE's authors), ``sde`` (Euler-Maruyama), ``ode`` (Euler), or semi-analytic
            ``mrs-ode1``, ``mrs-ode2``, ``mrs-sde2``, ``mars-ode2``, ``mars-sde2``.
        steps: Evaluations of the network, at most those of the schedule; None: all of the schedule.
        seed: Seed of the noise. The same seed gives an image the same noise in any batch.

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
    """Interface of methods that run their network many times on a state, as diffusions do.

    ``forward`` then accepts two more arguments: ``tiled(image, function)``, which applies a function to an image tile
    by tile, for use at every step; and ``show(steps, total)``, which wraps the steps to report progress.

    Attributes:
        sampling: Solver (not None), number of steps and seed.
    """

    sampling: Sampling

    @abstractmethod
    def set_sampling(self, sampling: Sampling) -> None:
        """Set solver, number of steps and seed.

        Raises:
            ArgumentError: If the method has no such solver, or cannot take so many steps.
        """


class Explains(ABC):
    """Interface of methods that explain a restoration.

    Attributes:
        maps: Names of the maps that `explain` appends.
        explaining: Whether ``predict_step`` returns the maps too.
    """

    maps: tuple[str, ...] = ()
    explaining: bool = False

    @abstractmethod
    def explain(self, rainy: Float[Tensor, "b 3 h w"], **conditions: Any) -> Float[Tensor, "b n h w"]:
        """Return the derained image and, after its three channels, the ``maps`` in [0, 1].

        Args:
            rainy: Images in [0, 1].
            **conditions: What ``encode`` returned.
        """

    def describe_image(self, conditions: dict[str, Any], index: int) -> dict[str, Any]:
        """Return what ``encode`` found in an image of a batch, as JSON can hold it; nothing by default."""
        return {}


class RunsGraph(ABC):
    """Interface of diffusions whose exported graph is one step, and that restore by a graph that was read again.

    ``derain export`` supports the inputs ``state``, ``rainy`` and ``times`` in this order, then optionally ``content``
    and ``degradation``, vectors of the size that the hyper-parameter ``context`` gives. Graphs of all other methods
    have one input, ``rainy``.
    """

    @classmethod
    @abstractmethod
    def from_graph(cls, metadata: Mapping[str, Any], network: nn.Module, inputs: list[str]) -> Any:
        """Return the method with a graph in place of its network.

        Args:
            metadata: Metadata of the file.
            network: Runs the graph: tensors in the order of ``inputs``, or by name.
            inputs: Names of the inputs.

        Raises:
            ValueError: If the inputs do not fit the metadata.
        """
