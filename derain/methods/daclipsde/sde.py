"""The mean-reverting SDE: forward marginals, score, optimum reverse step, training objective.

Luo et al., Image Restoration with Mean-Reverting Stochastic Differential Equations, ICML 2023; Pullabhotla, Image
Deraining using Degradation-aware CLIP, eqs. 5-10, whose misprints are corrected: ``x(0)`` is the clean image and the
mean ``μ`` the rainy one; the noise integral of eq. 6 is ``∫ σ_z exp(-θ̄_{z:t}) dw``; eq. 9 has ``-σ² score``.

    dx = θ_t (μ - x) dt + σ_t dw,    σ_t² = 2 λ² θ_t

With ``τ(t) = ∫ θ`` from 0 to t, everything depends on τ alone: the residual ``x - μ`` shrinks by ``exp(-τ)`` and its
variance is ``λ² (1 - exp(-2τ))``. Discrete times are 0 (clean), 1, …, T (rainy, with noise).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from derain.errors import DerainError

Schedule = Literal["cosine", "linear", "constant"]
MOST_STEPS = 100_000
"""Of a schedule; published ones have 100 to 1,000."""

Image = Float[Tensor, "b c h w"]
Times = Int[Tensor, " b"]


def speeds(schedule: Schedule, steps: int) -> Float[Tensor, " t"]:
    """The speed θ of the mean reversion at the times 0, …, T, in float64, up to a factor that does not matter.

    Args:
        schedule: ``cosine``: one minus the squared cosine of improved DDPM; ``linear``: growing 200-fold;
            ``constant``.
        steps: T.

    Example:
        >>> [round(float(speeds("cosine", 100)[t]), 6) for t in (0, 1, 50, 100)]
        [0.000614, 0.001695, 0.506156, 0.999767]
    """
    if schedule == "constant":
        return torch.ones(steps + 1, dtype=torch.float64)
    if schedule == "linear":
        scale = 1000 / (steps + 1)
        return torch.linspace(scale * 1e-4, scale * 2e-2, steps + 1, dtype=torch.float64)
    k = torch.arange(steps + 3, dtype=torch.float64) / (steps + 2)
    squared = torch.cos((k + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - squared / squared[0])[1:-1]


class MeanRevertingSDE:
    """A schedule of the mean-reverting SDE and the formulas that follow from it.

    Images are computed in float32 whatever the network's precision; constants in float64.

    Args:
        max_sigma: Stationary standard deviation λ, as a share of 255 if it is 1 or more.
        steps: T, the number of discrete times.
        eps: What is left of the clean image's residual at time T: ``exp(-τ(T))``.
        schedule: How the speed θ changes with time.
        speed: The speeds at times 0, …, T instead of a named schedule, as ``state`` gave them.

    Attributes:
        scale: λ.
        tau: ``(T + 1,)`` float64, the integral of θ up to each time.
        decay: ``exp(-τ)``: what is left at each time of the clean image's residual, eq. 8.
        deviation: Standard deviation at each time given the clean image: the root of eq. 8's ``v``.

    Raises:
        DerainError: If a value is out of its range.

    Example:
        >>> sde = MeanRevertingSDE(max_sigma=10.0)
        >>> round(sde.dt, 6), round(float(sde.deviation[50]), 6)
        (0.104094, 0.036574)
    """

    def __init__(
        self,
        max_sigma: float = 50.0,
        steps: int = 100,
        eps: float = 0.005,
        schedule: Schedule = "cosine",
        speed: Sequence[float] | None = None,
    ) -> None:
        if not 0 < max_sigma < math.inf:
            raise DerainError(f"--model.max_sigma {max_sigma}: must be above 0")
        if not 1 <= steps <= MOST_STEPS:
            raise DerainError(f"--model.sde_steps {steps}: must be 1 to {MOST_STEPS:,}")
        if not 0 < eps < 1:
            raise DerainError(f"--model.eps {eps}: must be between 0 and 1")
        self.max_sigma, self.eps = max_sigma, eps
        self.scale = max_sigma / 255 if max_sigma >= 1 else max_sigma
        self.speed = speeds(schedule, steps) if speed is None else torch.tensor(speed, dtype=torch.float64)
        total = self.speed.cumsum(0) - self.speed[0]
        if not (self.speed.min() >= 0 and 0 < total[-1] < math.inf):
            raise DerainError(f"a schedule of the SDE with speeds from {self.speed.min()} on; expected positive ones")
        self.dt = -math.log(eps) / float(total[-1])
        self.tau = total * self.dt
        self.decay = torch.exp(-self.tau)
        self.deviation = self.spread(self.tau)

    def spread(self, tau: Tensor) -> Tensor:
        """Standard deviation after a stretch of τ, from a known image."""
        return self.scale * torch.sqrt(-torch.expm1(-2 * tau))

    @property
    def steps(self) -> int:
        """T."""
        return len(self.tau) - 1

    def state(self) -> dict[str, object]:
        """What rebuilds exactly this schedule, for files of weights."""
        return {"max_sigma": self.max_sigma, "eps": self.eps, "speed": self.speed.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, object]) -> "MeanRevertingSDE":
        """The schedule that ``state`` described."""
        speed: list[float] = state["speed"]  # type: ignore[assignment]
        return cls(float(state["max_sigma"]), len(speed) - 1, float(state["eps"]), speed=speed)  # type: ignore[arg-type]

    # What follows takes a batch of times, on the CPU.

    def mean(self, clean: Image, rainy: Image, times: Times) -> Image:
        """Mean of ``x(t)`` given the clean image: ``m_t`` of eq. 8."""
        return rainy + (clean - rainy).float() * _at(self.decay, times, rainy)

    def diffuse(self, clean: Image, rainy: Image, times: Times, noise: Image) -> Image:
        """A sample of ``x(t)`` given the clean image, eq. 7.

        Args:
            clean: ``x(0)``.
            rainy: ``μ``.
            times: In 0, …, T.
            noise: Standard normal.
        """
        return self.mean(clean, rainy, times) + _at(self.deviation, times, rainy) * noise

    def score(self, noise: Image, times: Times) -> Image:
        """Gradient of the log density, from the noise that was added or is estimated: eq. 10; times from 1."""
        return -noise.float() / _at(self.deviation, times, noise)

    def clean(self, state: Image, rainy: Image, noise: Image, times: Times) -> Image:
        """The clean image that an estimate of the noise amounts to: eqs. 7 and 8 solved for ``x(0)``."""
        residual = (state - rainy).float() - _at(self.deviation, times, rainy) * noise
        return rainy + residual / _at(self.decay, times, rainy)

    def precondition(self, times: Times, residual: float, like: Image) -> tuple[Tensor, Tensor, Tensor]:
        """What a state tells of its noise without a network (Karras et al., NeurIPS 2022).

        Of clean residuals with a known standard deviation, ``(x - μ) · kept`` is the best linear estimate of the noise.

        Args:
            times: ``t`` from 1.
            residual: Standard deviation of clean minus rainy images.
            like: What is on the device that the factors shall be on.

        Returns:
            ``(b, 1, 1, 1)`` each: the factor that brings ``x - μ`` to unit variance; ``kept``; what the best linear
            estimate leaves open, as a standard deviation.
        """
        signal, noise = self.decay[times] * residual, self.deviation[times]
        whole = torch.sqrt(signal**2 + noise**2)
        scale, kept, left = (_at(one, None, like) for one in (1 / whole, noise / whole**2, signal / whole))
        return scale, kept, left

    def euler(
        self, state: Image, rainy: Image, score: Image, times: Times, earlier: Times, *, ode: bool = False
    ) -> Image:
        """Mean of an Euler step back in time: eq. 9, or of the ordinary equation with half the score.

        Args:
            state: ``x(t)``.
            rainy: ``μ``.
            score: At ``x(t)``.
            times: ``t``.
            earlier: Where the step goes; the schedule's own steps go to ``t - 1``.
            ode: Step along the probability flow.
        """
        step = _at(self.tau[times] - self.tau[earlier], None, state)  # ∫ θ dt
        share = 1.0 if ode else 2.0
        return state.float() - step * (rainy - state) + share * self.scale**2 * step * score

    def optimum(self, state: Image, clean: Image, rainy: Image, times: Times, earlier: Times) -> Image:
        """The most likely earlier state, given ``x(t)`` and ``x(0)`` (IR-SDE, eq. 14): the posterior's mean."""
        part, whole, since = self._shares(times, earlier)
        weight_state = torch.exp(self.tau[earlier] - self.tau[times]) * since / whole
        weight_clean = self.decay[earlier] * part / whole
        residual = _at(weight_state, None, state) * (state - rainy).float()
        return rainy + residual + _at(weight_clean, None, state) * (clean - rainy)

    def optimum_deviation(self, times: Times, earlier: Times) -> Float[Tensor, " b"]:
        """Standard deviation of the earlier state, given ``x(t)`` and ``x(0)``; 0 where it goes to the time 0."""
        part, whole, since = self._shares(times, earlier)
        return self.scale * torch.sqrt(part * since / whole)

    def _shares(self, times: Times, earlier: Times) -> tuple[Tensor, Tensor, Tensor]:
        """``1 - exp(-2 τ)`` of the step, of the whole way from 0, and of the way to where the step ends."""
        stretches = (self.tau[times] - self.tau[earlier], self.tau[times], self.tau[earlier])
        part, whole, since = (-torch.expm1(-2 * stretch) for stretch in stretches)
        return part, whole, since


def _at(values: Tensor, times: Times | None, like: Tensor) -> Float[Tensor, "b 1 1 1"]:
    """Values of a batch of times, ready to multiply images by."""
    chosen = (values if times is None else values[times]).float()
    return chosen.to(like.device, non_blocking=like.is_cuda)[:, None, None, None]  # the GPU's queue goes on
