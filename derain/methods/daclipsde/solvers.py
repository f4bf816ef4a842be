"""Solvers of the reverse process: from the rainy image with noise to a clean one, in any number of steps.

They know the SDE and a function that estimates the noise, not the network. A solver goes down a subset of the
schedule's own times, so that fewer steps see the noise levels that the network was trained with.

The fast ones are semi-analytic. With ``y = x - μ``, the SDE of `sde.py` is that of a variance-preserving diffusion
of ``y / λ`` with signal ``α = exp(-τ)`` and noise ``σ = √(1 - α²)``. Written in ``ℓ = log(α / σ)``, half the log
signal-to-noise ratio, the probability flow is ``d(y/σ) / dℓ = exp(ℓ) ŷ``, where ``ŷ`` is the estimated clean
residual: the linear part is exact, and only ``ŷ``, which changes slowly, is approximated, by a constant (order 1) or
by a line through its last two values (order 2). Over a step ``h = ℓ_s - ℓ_t``:

    ode, κ = 1:  y_s = σ_s/σ_t y_t + α_s D
    sde, κ = 2:  y_s = σ_s/σ_t exp(-h) y_t + α_s D + λ σ_s √(1 - exp(-2h)) z

    D = (1 - exp(-κh)) ŷ_t + c (ŷ_t - ŷ_before) / h_before

Order 1 has ``c = 0``; of ``sde``, it is posterior sampling. Order 2 of ``mrs-*`` takes the line's value in the middle
of the step, as DPM-Solver++ does: ``c = h (1 - exp(-κh)) / 2``. MaRS (Li et al., ICLR 2025, arXiv 2502.07856),
``mars-*``, integrates the line: ``c = h - (1 - exp(-κh)) / κ``, which is larger for long steps. Both are of the same
order. The last step goes to ``σ = 0`` and gives ``x̂_0`` itself.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from derain.errors import DerainError
from derain.methods.daclipsde.sde import MeanRevertingSDE
from derain.methods.interfaces import Sampling

Image = Float[Tensor, "b c h w"]
Estimate = Callable[[Image, int], Image]
"""The noise in a state at a time."""


class Noise:
    """Standard normal noise, equal for all images of a batch and for a size always the same.

    Args:
        seed: Of the generator.
        like: Shape and device of the states.
    """

    def __init__(self, seed: int, like: Image) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.device = like.shape[1:], like.device

    def __call__(self) -> Float[Tensor, "1 c h w"]:
        """Draws the next one. It is drawn on the CPU, so that every device sees the same."""
        on_gpu = self.device.type == "cuda"
        drawn = torch.randn((1, *self.shape), generator=self.generator, pin_memory=on_gpu)
        return drawn.to(self.device, non_blocking=on_gpu)


def times_of(sde: MeanRevertingSDE, steps: int | None) -> list[int]:
    """The times that so many steps visit, from T down to 0, evenly spread.

    Raises:
        DerainError: If the schedule has fewer times.

    Example:
        >>> times_of(MeanRevertingSDE(steps=100), 4)
        [100, 75, 50, 25, 0]
    """
    steps = sde.steps if steps is None else steps
    if steps > sde.steps:
        raise DerainError(f"--steps {steps}: the schedule of these weights has {sde.steps} times; give at most that")
    return [round(sde.steps * left / steps) for left in range(steps, -1, -1)]


@torch.no_grad()
def sample(
    sde: MeanRevertingSDE,
    estimate: Estimate,
    rainy: Image,
    sampling: Sampling,
    show: Callable[[Iterable[tuple[int, int]], int], Iterable[tuple[int, int]]] = lambda steps, total: steps,
) -> Image:
    """Restores images.

    Args:
        sde: The schedule that the network was trained with.
        estimate: The network.
        rainy: ``μ``, in [0, 1].
        sampling: Solver, steps and seed.
        show: Wraps the steps, to show how far they are.

    Returns:
        Clean images, not clipped.

    Raises:
        DerainError: If more steps are asked for than the schedule has.
    """
    state = rainy
    for state in states(sde, estimate, rainy, sampling, show):  # noqa: B007 - the last one is the result
        pass
    return state


def states(
    sde: MeanRevertingSDE,
    estimate: Estimate,
    rainy: Image,
    sampling: Sampling,
    show: Callable[[Iterable[tuple[int, int]], int], Iterable[tuple[int, int]]] = lambda steps, total: steps,
) -> Iterator[Image]:
    """As `sample`, but yields the state at the start and after every step."""
    times = times_of(sde, sampling.steps)
    noise = Noise(sampling.seed, rainy)
    advance = SOLVERS[sampling.solver](sde, rainy.float(), noise)
    state = rainy.float() + sde.scale * noise()
    yield state
    for t, s in show(itertools.pairwise(times), len(times) - 1):
        state = advance(state, estimate(state, t).float(), t, s)
        yield state


class _Euler:
    """Euler steps of the reverse SDE, or of the probability flow."""

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
    """The optimum reverse step with its noise: IR-SDE's authors' sampler."""

    def __init__(self, sde: MeanRevertingSDE, rainy: Image, noise: Noise) -> None:
        self.sde, self.rainy, self.noise = sde, rainy, noise

    def __call__(self, state: Image, estimated: Image, t: int, s: int) -> Image:
        times, earlier = _pair(t, s, len(state))
        clean = self.sde.clean(state, self.rainy, estimated, times)
        mean = self.sde.optimum(state, clean, self.rainy, times, earlier)
        deviation = float(self.sde.optimum_deviation(times, earlier)[0])
        return mean + deviation * self.noise() if deviation else mean


class _SemiAnalytic:
    """Exponential integrator in ℓ with data prediction.

    Args:
        sde: The schedule.
        rainy: ``μ``.
        noise: What ``stochastic`` steps add.
        order: 1, or 2 for a line through the last two estimates.
        stochastic: Step along the SDE instead of the probability flow.
        integrated: Integrate that line, as MaRS does, instead of taking its value in the middle.
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
        self.ratio = torch.log(sde.decay / (sde.deviation / sde.scale))  # ℓ; infinite at time 0
        self.before: tuple[Image, float] | None = None

    def __call__(self, state: Image, estimated: Image, t: int, s: int) -> Image:
        times, _ = _pair(t, s, len(state))
        residual = self.sde.clean(state, self.rainy, estimated, times) - self.rainy
        if s == 0:
            return self.rainy + residual
        step = float(self.ratio[s] - self.ratio[t])
        kappa = 2 if self.stochastic else 1
        change = 1 - math.exp(-kappa * step)
        drift = change * residual
        if self.order == 2 and self.before is not None:
            last, step_before = self.before
            weight = step - change / kappa if self.integrated else step / 2 * change
            drift = drift + weight / step_before * (residual - last)
        self.before = residual, step
        shrink = float(self.sde.deviation[s] / self.sde.deviation[t]) * math.exp((1 - kappa) * step)
        mean = self.rainy + shrink * (state - self.rainy) + float(self.sde.decay[s]) * drift
        if not self.stochastic:
            return mean
        return mean + float(self.sde.deviation[s]) * math.sqrt(change) * self.noise()


def _pair(t: int, s: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.full((count,), t), torch.full((count,), s)


SOLVERS: dict[str, Callable[[MeanRevertingSDE, Image, Noise], Callable[[Image, Image, int, int], Image]]] = {
    "posterior": _Posterior,
    "sde": _Euler,
    "ode": lambda sde, rainy, noise: _Euler(sde, rainy, noise, ode=True),
    "mrs-ode1": lambda sde, rainy, noise: _SemiAnalytic(sde, rainy, noise, order=1),
    "mrs-ode2": lambda sde, rainy, noise: _SemiAnalytic(sde, rainy, noise, order=2),
    "mrs-sde2": lambda sde, rainy, noise: _SemiAnalytic(sde, rainy, noise, order=2, stochastic=True),
    "mars-ode2": lambda sde, rainy, noise: _SemiAnalytic(sde, rainy, noise, order=2, integrated=True),
    "mars-sde2": lambda sde, rainy, noise: _SemiAnalytic(sde, rainy, noise, order=2, stochastic=True, integrated=True),
}
"""Every solver: made for a rainy image, it takes a state and the noise in it from one time to an earlier one."""
