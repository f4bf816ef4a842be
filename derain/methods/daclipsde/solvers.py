"""Solvers of the reverse SDE: from a rainy image plus noise to a derained image, in a chosen number of steps.

A solver needs the SDE and a function that estimates the noise. Solvers visit only times of the schedule, so the network
sees only noise levels that it was trained with.

The ``mrs-*`` and ``mars-*`` solvers are semi-analytic. With ``y = x - μ``, the SDE of `sde.py` is a
variance-preserving diffusion of ``y / λ`` with signal ``α = exp(-τ)`` and noise ``σ = √(1 - α²)``. In terms of
``ℓ = log(α / σ)``, half the log signal-to-noise ratio, the probability flow is ``d(y/σ) / dℓ = exp(ℓ) ŷ``, where ``ŷ``
is the estimated clean residual. The solution is exact except for ``ŷ``, which is approximated as a function of ``ℓ``:
by a constant (order 1), or by a line through the last two ``ŷ`` (order 2). Over a step from ``t`` to ``s`` with
``h = ℓ_s - ℓ_t`` and standard normal noise ``z``:

    ode, κ = 1:  y_s = σ_s/σ_t y_t + α_s D
    sde, κ = 2:  y_s = σ_s/σ_t exp(-h) y_t + α_s D + λ σ_s √(1 - exp(-2h)) z

    D = (1 - exp(-κh)) ŷ_t + c (ŷ_t - ŷ_before) / h_before

``ŷ_before`` and ``h_before`` belong to the step before. Order 1, and the first step of order 2, have ``c = 0``; for
``sde``, this is posterior sampling. Order 2 of ``mrs-*`` uses the line's value in the middle of the step, as
DPM-Solver++ does: ``c = h (1 - exp(-κh)) / 2``. ``mars-*`` (MaRS: Li et al., ICLR 2025, arXiv 2502.07856) integrates
the line: ``c = h - (1 - exp(-κh)) / κ``. The last step ends at ``σ = 0`` and returns the estimated clean image
``μ + ŷ``.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from derain.errors import ArgumentError
from derain.methods.daclipsde.sde import MeanRevertingSDE
from derain.methods.interfaces import Sampling

Image = Float[Tensor, "b c h w"]
Estimate = Callable[[Image, int], Image]
"""Function of a state and its time that returns the estimated noise in the state."""
Step = tuple[int, int]
"""Times before and after a step."""
Show = Callable[[Iterable[Step], int], Iterable[Step]]
"""Function that receives the steps and their number, and yields the steps while it shows progress."""


class Noise:
    """Reproducible sequence of standard normal noise, the same for all images of a batch and on every device.

    Args:
        seed: Seed of the generator.
        like: Tensor with the shape and device of the states.
    """

    def __init__(self, seed: int, like: Image) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.device = like.shape[1:], like.device

    def __call__(self) -> Float[Tensor, "1 c h w"]:
        """Return the next noise, which is drawn on the CPU."""
        on_gpu = self.device.type == "cuda"
        noise = torch.randn((1, *self.shape), generator=self.generator, pin_memory=on_gpu)
        return noise.to(self.device, non_blocking=on_gpu)


def visited_times(sde: MeanRevertingSDE, steps: int | None) -> list[int]:
    """Return the times from T down to 0 that a solver visits, evenly spaced up to rounding.

    Args:
        sde: The SDE, whose schedule has T steps.
        steps: Number of steps, at most T; None: T.

    Raises:
        ArgumentError: If ``steps`` is greater than T.

    Example:
        >>> visited_times(MeanRevertingSDE(steps=100), 4)
        [100, 75, 50, 25, 0]
    """
    if steps is None:
        steps = sde.steps
    if steps > sde.steps:
        raise ArgumentError(f"steps {steps}: the schedule of these weights has {sde.steps} steps; use at most that")
    return [round(sde.steps * remaining / steps) for remaining in range(steps, -1, -1)]


@torch.no_grad()
def sample(
    sde: MeanRevertingSDE,
    estimate: Estimate,
    rainy: Image,
    sampling: Sampling,
    show: Show = lambda steps, total: steps,
) -> Image:
    """Restore images by solving the reverse process.

    Args:
        sde: SDE with the schedule that the network was trained with.
        estimate: Function that estimates the noise in a state, such as the network.
        rainy: Rainy images ``μ`` in [0, 1].
        sampling: Solver, number of steps and seed.
        show: Function that iterates over the steps and shows progress.

    Returns:
        Derained images, not clamped.

    Raises:
        ArgumentError: If the schedule has fewer steps than ``sampling``, or there is no such solver.
    """
    last = rainy
    for state in states(sde, estimate, rainy, sampling, show):
        last = state
    return last


def states(
    sde: MeanRevertingSDE,
    estimate: Estimate,
    rainy: Image,
    sampling: Sampling,
    show: Show = lambda steps, total: steps,
) -> Iterator[Image]:
    """Yield the state at the start and after every step; arguments and exceptions are those of `sample`."""
    times = visited_times(sde, sampling.steps)
    noise = Noise(sampling.seed, rainy)
    advance = SOLVERS[solver_name(sampling)](sde, rainy.float(), noise)
    state = rainy.float() + sde.scale * noise()
    yield state
    for t, s in show(itertools.pairwise(times), len(times) - 1):
        state = advance(state, estimate(state, t).float(), t, s)
        yield state


class _Euler:
    """Euler step of the reverse SDE, or of the probability flow."""

    def __init__(self, sde: MeanRevertingSDE, rainy: Image, noise: Noise, *, ode: bool = False) -> None:
        self.sde, self.rainy, self.noise, self.ode = sde, rainy, noise, ode

    def __call__(self, state: Image, estimated: Image, t: int, s: int) -> Image:
        times, earlier = _pair(t, s, len(state))
        score = self.sde.score(estimated, times)
        mean = self.sde.euler(state, self.rainy, score, times, earlier, ode=self.ode)
        if self.ode:
            return mean
        step = float(self.sde.tau[t] - self.sde.tau[s])
        return mean + self.sde.scale * math.sqrt(2 * step) * self.noise()


class _Posterior:
    """Sampling from the posterior of the earlier state, as in the code of IR-SDE's authors."""

    def __init__(self, sde: MeanRevertingSDE, rainy: Image, noise: Noise) -> None:
        self.sde, self.rainy, self.noise = sde, rainy, noise

    def __call__(self, state: Image, estimated: Image, t: int, s: int) -> Image:
        times, earlier = _pair(t, s, len(state))
        clean = self.sde.clean(state, self.rainy, estimated, times)
        mean = self.sde.posterior_mean(state, clean, self.rainy, times, earlier)
        std = float(self.sde.posterior_std(times, earlier)[0])
        if std == 0:
            return mean
        return mean + std * self.noise()


class _SemiAnalytic:
    """Step of the solvers ``mrs-*`` and ``mars-*``, see the docstring of the module.

    Args:
        sde: The SDE.
        rainy: Rainy images ``μ``.
        noise: Noise for ``stochastic`` steps.
        order: 1, or 2 for a line through the last two estimates.
        stochastic: Whether to solve the SDE instead of the probability flow.
        integrated: Whether order 2 integrates the line, as MaRS does, instead of using the line's value in the middle.
    """

    def __init__(
        self,
        sde: MeanRevertingSDE,
        rainy: Image,
        noise: Noise,
        *,
        order: int,
        stochastic: bool = False,
        integrated: bool = False,
    ) -> None:
        self.sde, self.rainy, self.noise, self.order = sde, rainy, noise, order
        self.stochastic, self.integrated = stochastic, integrated
        self.half_log_snr = torch.log(sde.decay / (sde.marginal_std / sde.scale))  # ℓ; infinite at time 0
        self.previous: tuple[Image, float] | None = None  # ŷ and h of the step before

    def __call__(self, state: Image, estimated: Image, t: int, s: int) -> Image:
        times, _ = _pair(t, s, len(state))
        residual = self.sde.clean(state, self.rainy, estimated, times) - self.rainy
        if s == 0:
            return self.rainy + residual
        step = float(self.half_log_snr[s] - self.half_log_snr[t])
        kappa = 2 if self.stochastic else 1
        change = 1 - math.exp(-kappa * step)
        drift = change * residual
        if self.order == 2 and self.previous is not None:
            previous_residual, previous_step = self.previous
            weight = step - change / kappa if self.integrated else step / 2 * change
            drift = drift + weight / previous_step * (residual - previous_residual)
        self.previous = residual, step
        shrink = float(self.sde.marginal_std[s] / self.sde.marginal_std[t]) * math.exp((1 - kappa) * step)
        mean = self.rainy + shrink * (state - self.rainy) + float(self.sde.decay[s]) * drift
        if not self.stochastic:
            return mean
        return mean + float(self.sde.marginal_std[s]) * math.sqrt(change) * self.noise()


def _pair(t: int, s: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.full((count,), t), torch.full((count,), s)


def solver_name(sampling: Sampling) -> str:
    """Return the name of the solver: ``posterior`` if ``sampling`` names none.

    Raises:
        ArgumentError: If there is no such solver.
    """
    name = sampling.solver or "posterior"
    if name not in SOLVERS:
        raise ArgumentError(f"solver {name}: unknown; choose from {', '.join(SOLVERS)}")
    return name


Solver = Callable[[Image, Image, int, int], Image]

SOLVERS: dict[str, Callable[[MeanRevertingSDE, Image, Noise], Solver]] = {
    "posterior": _Posterior,
    "sde": _Euler,
    "ode": lambda sde, rainy, noise: _Euler(sde, rainy, noise, ode=True),
    "mrs-ode1": lambda sde, rainy, noise: _SemiAnalytic(sde, rainy, noise, order=1),
    "mrs-ode2": lambda sde, rainy, noise: _SemiAnalytic(sde, rainy, noise, order=2),
    "mrs-sde2": lambda sde, rainy, noise: _SemiAnalytic(sde, rainy, noise, order=2, stochastic=True),
    "mars-ode2": lambda sde, rainy, noise: _SemiAnalytic(sde, rainy, noise, order=2, integrated=True),
    "mars-sde2": lambda sde, rainy, noise: _SemiAnalytic(sde, rainy, noise, order=2, stochastic=True, integrated=True),
}
"""Constructors of solvers by name.

A solver is a function of a state, the estimated noise, the time of the state and an earlier time. It returns the state
at the earlier time.
"""
