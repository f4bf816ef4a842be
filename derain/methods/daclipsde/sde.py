"""Mean-reverting SDE: marginal distributions, score, and posterior of an earlier state.

Luo et al., Image Restoration with Mean-Reverting Stochastic Differential Equations, ICML 2023; Pullabhotla, Image
Deraining using Degradation-aware CLIP, eqs. 5-10, with misprints corrected: ``x(0)`` is the clean image and the mean
``μ`` the rainy one; the noise integral of eq. 6 is ``∫ σ_z exp(-θ̄_{z:t}) dw``; the numerator of eq. 10 is
``x(t) - m_t(x(0))``.

    dx = θ_t (μ - x) dt + σ_t dw,    σ_t² = 2 λ² θ_t

With ``τ(t) = ∫ θ`` from 0 to t, ``x(t)`` given ``x(0)`` depends on τ alone: the mean of the residual ``x - μ`` is
``exp(-τ)`` times the initial residual, and the variance is ``λ² (1 - exp(-2τ))``. Discrete times are 0 (clean), 1, …, T
(rainy, with noise).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from derain.errors import DerainError

Schedule = Literal["cosine", "linear", "constant"]
MAX_STEPS = 100_000
"""Maximum number of steps of a schedule."""

Image = Float[Tensor, "b c h w"]
Times = Int[Tensor, " b"]


def theta_schedule(schedule: Schedule, steps: int) -> Float[Tensor, " t"]:
    """Return the speed θ of the mean reversion at the times 0, …, T, up to a constant factor (eq. 5).

    Args:
        schedule: ``cosine``: one minus the squared cosine of improved DDPM; ``linear``: from 1 to 200 times the initial
            value; ``constant``: the same at all times.
        steps: Number of steps T.

    Returns:
        ``(T + 1,)`` float64.

    References:
        Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, ICML 2021, for ``cosine``.

    Example:
        >>> [round(float(theta_schedule("cosine", 100)[t]), 6) for t in (0, 1, 50, 100)]
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
    """Mean-reverting SDE with a discrete schedule.

    Constants are float64. Methods that return images compute in float32, whatever the precision of the network.

    Args:
        max_sigma: Stationary standard deviation λ for images in [0, 1]; values of 1 or more are divided by 255.
        steps: Number of steps T.
        eps: Fraction of the clean residual ``x(0) - μ`` that remains at time T: ``exp(-τ(T))``, in (0, 1).
        schedule: How the speed θ changes with time, see `theta_schedule`.
        speed: Speeds at the times 0, …, T, as `state` returns them; they replace those of ``steps`` and ``schedule``.

    Attributes:
        scale: λ for images in [0, 1].
        speed: ``(T + 1,)`` float64, θ at each time up to the factor ``dt``.
        dt: Length of a step, chosen such that ``exp(-τ(T))`` is ``eps``.
        tau: ``(T + 1,)`` float64, τ at each time.
        decay: ``(T + 1,)`` float64, ``exp(-τ)``: fraction of the clean residual that remains, eq. 8.
        marginal_std: ``(T + 1,)`` float64, standard deviation of ``x(t)`` given ``x(0)``: the square root of ``v_t``
            in eq. 8.

    Raises:
        DerainError: If a value is out of its range.

    Example:
        >>> sde = MeanRevertingSDE(max_sigma=10.0)
        >>> round(sde.dt, 6), round(float(sde.marginal_std[50]), 6)
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
            raise DerainError(f"--model.max_sigma {max_sigma}: expected a finite number above 0")
        if not 1 <= steps <= MAX_STEPS:
            raise DerainError(f"--model.sde_steps {steps}: expected 1 to {MAX_STEPS:,}")
        if not 0 < eps < 1:
            raise DerainError(f"--model.eps {eps}: expected a number between 0 and 1")
        self.max_sigma, self.eps = max_sigma, eps
        self.scale = max_sigma / 255 if max_sigma >= 1 else max_sigma
        self.speed = theta_schedule(schedule, steps) if speed is None else torch.tensor(speed, dtype=torch.float64)
        total = self.speed.cumsum(0) - self.speed[0]
        if not (self.speed.min() >= 0 and 0 < total[-1] < math.inf):
            raise DerainError(
                f"SDE schedule with lowest speed {self.speed.min()}: expected finite speeds of at least 0, not all 0; "
                "use a file that derain wrote"
            )
        self.dt = -math.log(eps) / float(total[-1])
        self.tau = total * self.dt
        self.decay = torch.exp(-self.tau)
        self.marginal_std = self.std(self.tau)

    def std(self, tau: Tensor) -> Tensor:
        """Return the standard deviation of a state given an earlier state, whose τ is smaller by ``tau``."""
        return self.scale * torch.sqrt(-torch.expm1(-2 * tau))

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return len(self.tau) - 1

    def state(self) -> dict[str, object]:
        """Return what `from_state` needs to rebuild this schedule exactly: ``max_sigma``, ``eps`` and ``speed``."""
        return {"max_sigma": self.max_sigma, "eps": self.eps, "speed": self.speed.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, object]) -> "MeanRevertingSDE":
        """Return the SDE with the schedule that `state` returned.

        Raises:
            DerainError: If a value is out of its range.
        """
        speed: list[float] = state["speed"]  # type: ignore[assignment]
        return cls(float(state["max_sigma"]), len(speed) - 1, float(state["eps"]), speed=speed)  # type: ignore[arg-type]

    # Times are a batch, on the CPU.

    def mean(self, clean: Image, rainy: Image, times: Times) -> Image:
        """Return the mean of ``x(t)`` given the clean image: ``m_t`` of eq. 8."""
        return rainy + (clean - rainy).float() * _per_image(self.decay[times], rainy)

    def diffuse(self, clean: Image, rainy: Image, times: Times, noise: Image) -> Image:
        """Return the sample of ``x(t)`` that given noise determines, eq. 7.

        Args:
            clean: Clean images ``x(0)``.
            rainy: Rainy images ``μ``.
            times: Times ``t`` in 0, …, T.
            noise: Standard normal noise.
        """
        return self.mean(clean, rainy, times) + _per_image(self.marginal_std[times], rainy) * noise

    def score(self, noise: Image, times: Times) -> Image:
        """Return the gradient of the log density of ``x(t)`` given ``x(0)``, eq. 10, from the noise in the state.

        Args:
            noise: Standard normal noise in the state, added or estimated.
            times: Times ``t`` from 1; at 0, the score is not finite.
        """
        return -noise.float() / _per_image(self.marginal_std[times], noise)

    def clean(self, state: Image, rainy: Image, noise: Image, times: Times) -> Image:
        """Return the clean image, given the noise in ``x(t)``: eqs. 7 and 8 solved for ``x(0)``."""
        residual = (state - rainy).float() - _per_image(self.marginal_std[times], rainy) * noise
        return rainy + residual / _per_image(self.decay[times], rainy)

    def precondition(self, times: Times, residual: float, like: Image) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors for preconditioning (Karras et al., NeurIPS 2022): ``input_scale``, ``slope`` and ``error``.

        ``input_scale * (x(t) - μ)`` has unit variance. The best linear estimate of the noise in a state is
        ``slope * (x(t) - μ)``, and ``error`` is the standard deviation of this estimate's error.

        Args:
            times: Times ``t`` from 1.
            residual: Standard deviation of clean minus rainy images.
            like: Tensor whose device the result is on.

        Returns:
            The three factors, ``(b, 1, 1, 1)`` each.
        """
        signal = self.decay[times] * residual
        noise = self.marginal_std[times]
        total = torch.sqrt(signal**2 + noise**2)
        input_scale = _per_image(1 / total, like)
        slope = _per_image(noise / total**2, like)
        error = _per_image(signal / total, like)
        return input_scale, slope, error

    def euler(
        self, state: Image, rainy: Image, score: Image, times: Times, earlier: Times, *, ode: bool = False
    ) -> Image:
        """Return the state after an Euler step back in time, without noise: of eq. 9, or of the probability flow ODE.

        Args:
            state: States ``x(t)``.
            rainy: Rainy images ``μ``.
            score: Scores at ``x(t)``, see `score`.
            times: Times at which the step begins.
            earlier: Times at which the step ends.
            ode: Whether to step along the probability flow ODE, which has half the score of eq. 9.
        """
        step = _per_image(self.tau[times] - self.tau[earlier], state)  # ∫ θ dt
        factor = 1.0 if ode else 2.0
        return state.float() - step * (rainy - state) + factor * self.scale**2 * step * score

    def posterior_mean(self, state: Image, clean: Image, rainy: Image, times: Times, earlier: Times) -> Image:
        """Return the mean, and most likely value, of the earlier state given ``x(t)`` and ``x(0)`` (IR-SDE, eq. 14)."""
        step, total, rest = self._variances(times, earlier)
        weight_state = torch.exp(self.tau[earlier] - self.tau[times]) * rest / total
        weight_clean = self.decay[earlier] * step / total
        residual = _per_image(weight_state, state) * (state - rainy).float()
        return rainy + residual + _per_image(weight_clean, state) * (clean - rainy)

    def posterior_std(self, times: Times, earlier: Times) -> Float[Tensor, " b"]:
        """Return the standard deviation of the earlier state given ``x(t)`` and ``x(0)``; 0 if ``earlier`` is 0."""
        step, total, rest = self._variances(times, earlier)
        return self.scale * torch.sqrt(step * rest / total)

    def _variances(self, times: Times, earlier: Times) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``1 - exp(-2 τ)`` from ``earlier`` to ``times``, from 0 to ``times``, and from 0 to ``earlier``."""
        step = -torch.expm1(-2 * (self.tau[times] - self.tau[earlier]))
        total = -torch.expm1(-2 * self.tau[times])
        rest = -torch.expm1(-2 * self.tau[earlier])
        return step, total, rest


def _per_image(values: Float[Tensor, " b"], like: Tensor) -> Float[Tensor, "b 1 1 1"]:
    """Return one float32 factor per image, on the device of the images."""
    # Non-blocking, so that the host does not wait for the GPU's queue.
    return values.float().to(like.device, non_blocking=like.is_cuda)[:, None, None, None]
