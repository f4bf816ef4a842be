"""Solvers on problems with known solutions: the true noise, and one-dimensional Gaussian residuals."""

import itertools
import math

import pytest
import torch

from derain.errors import DerainError
from derain.methods import DACLIPSDEModule
from derain.methods.daclipsde.sde import MeanRevertingSDE
from derain.methods.daclipsde.solvers import SOLVERS, Noise, Sampling, sample, states, visited_times

EXACT = ("posterior", "mrs-ode1", "mrs-ode2", "mrs-sde2", "mars-ode2", "mars-sde2")


def db(image, reference):
    return -10 * math.log10(float((image.double() - reference.double()).square().mean()))


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(1, 3, 64, 64, generator=generator)
    rainy = clean + 0.1593 * torch.randn(1, 3, 64, 64, generator=generator)  # 15.96 dB
    assert db(rainy, clean) == pytest.approx(15.96, abs=0.1)
    return clean, rainy


def oracle(sde, clean, rainy):
    """Return a function that computes the noise in a state from the clean image."""

    def estimate(state, time):
        return (state - sde.mean(clean, rainy, torch.full((len(state),), time))) / float(sde.marginal_std[time])

    return estimate


@pytest.mark.parametrize(("max_sigma", "sde_db", "ode_db"), [(10.0, 62.6, 64.9), (50.0, 48.8, 51.1)])
def test_true_noise_restores_the_clean_image(pair, max_sigma, sde_db, ode_db):
    clean, rainy = pair
    sde = MeanRevertingSDE(max_sigma)
    psnr = {s: db(sample(sde, oracle(sde, clean, rainy), rainy, Sampling(s, None)), clean) for s in SOLVERS}
    assert all(psnr[name] > 130 for name in EXACT), psnr
    assert psnr["sde"] == pytest.approx(sde_db, abs=0.4)
    assert psnr["ode"] == pytest.approx(ode_db, abs=0.4)


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("steps", [1, 2, 5, 37, 99])
def test_semi_analytic_steps_are_exact_for_the_true_noise(pair, solver, steps):
    clean, rainy = pair
    sde = MeanRevertingSDE(10.0)
    derained = sample(sde, oracle(sde, clean, rainy), rainy, Sampling(solver, steps))
    assert db(derained, clean) > (100 if steps == 1 else 130)  # one step multiplies rounding errors by 200


@pytest.mark.parametrize("solver", EXACT)
def test_bfloat16_noise_is_harmful_only_with_one_step(pair, solver):
    clean, rainy = pair
    sde = MeanRevertingSDE(50.0)
    exact = oracle(sde, clean, rainy)

    def rounded(state, time):
        return exact(state, time).bfloat16().float()

    psnr = [db(sample(sde, rounded, rainy, Sampling(solver, steps)), clean) for steps in (1, 5, 10)]
    assert psnr[0] < 30
    assert min(psnr[1:]) > 70


# A clean image of independent Gaussian pixels: mean residual a, standard deviation s. The estimate that an ideal
# network would give, and the distribution at time 0, have closed forms.

MEAN, STD = 0.3, 0.15


def gaussian(sde, rainy):
    """Return a function that computes the expected noise in a state, for Gaussian clean residuals."""

    def estimate(state, time):
        decay, deviation = float(sde.decay[time]), float(sde.marginal_std[time])
        variance = decay**2 * STD**2 + deviation**2
        return deviation * (state - rainy - decay * MEAN) / variance

    return estimate


def closed_form(sde, solver, times):
    """Mean and standard deviation of a solver's result: each step is linear in the state, so both have a recursion.

    The linear maps are those of the docstrings, in float64, written per solver: ``y' = p y + q ŷ + r z`` with the ideal
    ``ŷ = g y + (1 - g α) a`` and its counterpart one step before.
    """
    mean, variance, before = 0.0, sde.scale**2, None
    previous = (0.0, 0.0, 0.0)  # mean of the last ŷ, its variance, covariance with y
    for t, s in itertools.pairwise(times):
        tau_t, tau_s = float(sde.tau[t]), float(sde.tau[s])
        alpha, beta = math.exp(-tau_t), math.exp(-tau_s)
        sd_t, sd_s = (sde.scale * math.sqrt(1 - math.exp(-2 * tau)) for tau in (tau_t, tau_s))
        total = alpha**2 * STD**2 + sd_t**2
        gain = alpha * STD**2 / total  # ŷ = a + gain (y - α a)
        estimate_mean = MEAN + gain * (mean - alpha * MEAN)
        p = q = r = extra = 0.0
        if solver in {"sde", "ode"}:
            step = tau_t - tau_s
            share = 2 if solver == "sde" else 1
            # score = -(y - α ŷ) / sd²
            p, q = 1 + step - share * sde.scale**2 * step / sd_t**2, share * sde.scale**2 * step * alpha / sd_t**2
            r = sde.scale * math.sqrt(2 * step) if solver == "sde" else 0.0
        elif solver == "posterior":
            whole, part, rest = (1 - math.exp(-2 * tau) for tau in (tau_t, tau_t - tau_s, tau_s))
            p, q = math.exp(tau_s - tau_t) * rest / whole, beta * part / whole
            r = sde.scale * math.sqrt(part * rest / whole)
        elif s == 0:
            q = 1.0
        else:
            h = (-tau_s - math.log(sd_s)) - (-tau_t - math.log(sd_t))
            p, q = sd_s / sd_t, beta * (1 - math.exp(-h))
            line = beta * (h - 1 + math.exp(-h))  # MaRS
            if solver.endswith("sde2"):
                p, q = p * math.exp(-h), beta * (1 - math.exp(-2 * h))
                line = beta * (h - (1 - math.exp(-2 * h)) / 2)
                r = sd_s * math.sqrt(1 - math.exp(-2 * h))
            if solver.endswith("2") and before is not None:
                extra = -(line if solver.startswith("mars") else q * h / 2) / before
                q -= extra
            before = h
        last_mean, last_variance, last_cov = previous
        slope = p + q * gain
        new_mean = p * mean + q * estimate_mean + extra * last_mean
        new_variance = slope**2 * variance + extra**2 * last_variance + 2 * slope * extra * last_cov + r**2
        # Covariance of the new state with this step's estimate, for the next step's line.
        covariance = gain * (slope * variance + extra * last_cov)
        previous = (estimate_mean, gain**2 * variance, covariance)
        mean, variance = new_mean, new_variance
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [5, 10, 20, 50, 100])
def test_mean_and_std_of_a_gaussian(solver, steps):
    sde = MeanRevertingSDE(50.0)
    rainy = torch.full((1, 3, 256, 256), 0.2)
    residual = sample(sde, gaussian(sde, rainy), rainy, Sampling(solver, steps, seed=1)) - rainy
    mean, std = closed_form(sde, solver, visited_times(sde, steps))
    assert float(residual.mean()) == pytest.approx(mean, abs=3e-3)
    assert float(residual.std()) == pytest.approx(std, rel=0.01, abs=1e-3)


def test_steps_converge_to_the_true_distribution():
    """With more steps, mean and std approach those of the clean images."""
    for solver in SOLVERS:
        far, near = (closed_form(MeanRevertingSDE(50.0, n), solver, list(range(n, -1, -1))) for n in (20, 640))
        assert abs(near[0] - MEAN) < 0.01
        assert abs(near[1] - STD) < min(0.005, abs(far[1] - STD)), solver


@pytest.mark.parametrize("max_sigma", [10.0, 50.0])
@pytest.mark.parametrize("kind", ["ode2", "sde2"])
def test_mars_is_better_in_5_steps_and_midpoint_in_10(kind, max_sigma):
    sde = MeanRevertingSDE(max_sigma)

    def error(solver, steps):
        mean, std = closed_form(sde, solver, visited_times(sde, steps))
        return math.hypot(mean - MEAN, std - STD)

    assert error(f"mars-{kind}", 5) < 0.95 * error(f"mrs-{kind}", 5)
    assert error(f"mars-{kind}", 10) > 1.1 * error(f"mrs-{kind}", 10)


def drift(solver, count):
    """Error at a middle time of the deterministic solver, started on the exact flow; ℓ evenly spaced.

    The noise of the schedule is far from 0 there, so that the order of the method shows.
    """
    sde = MeanRevertingSDE(50.0, 20_000)
    ratio = torch.log(sde.decay / (sde.marginal_std / sde.scale))
    low, high = float(ratio[18_000]), float(ratio[2_000])
    targets = torch.linspace(low, high, count + 1, dtype=torch.float64)
    times = [int((ratio - target).abs().argmin()) for target in targets]
    rainy = torch.zeros(1, 3, 1, 1)
    advance = SOLVERS[solver](sde, rainy.double(), Noise(0, rainy))
    state = torch.full((1, 3, 1, 1), 0.4, dtype=torch.float64)
    estimate = gaussian(sde, rainy)
    for t, s in itertools.pairwise(times):
        state = advance(state, estimate(state, t), t, s)

    def exact(y, t, s):
        stds = [math.sqrt(float(sde.decay[n]) ** 2 * STD**2 + float(sde.marginal_std[n]) ** 2) for n in (t, s)]
        return float(sde.decay[s]) * MEAN + stds[1] / stds[0] * (y - float(sde.decay[t]) * MEAN)

    return abs(float(state[0, 0, 0, 0]) - exact(0.4, times[0], times[-1]))


@pytest.mark.parametrize(("solver", "order"), [("mrs-ode1", 1), ("mrs-ode2", 2), ("mars-ode2", 2)])
def test_order_of_convergence(solver, order):
    errors = [drift(solver, count) for count in (32, 64, 128)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([order] * 2, abs=0.35), errors


# Sampling.


def test_same_seed_gives_the_same_image_in_any_batch(pair):
    _, rainy = pair
    sde = MeanRevertingSDE(10.0)
    torch.manual_seed(5)
    batch = torch.cat((torch.rand_like(rainy), rainy))
    for solver in SOLVERS:
        sampling = Sampling(solver, 7, seed=3)
        alone = sample(sde, gaussian(sde, rainy), rainy, sampling)
        torch.rand(1)  # PyTorch's own generator has no influence
        together = sample(sde, gaussian(sde, batch), batch, sampling)
        assert torch.equal(together[1:], alone), solver
        assert not torch.equal(alone, sample(sde, gaussian(sde, rainy), rainy, Sampling(solver, 7, seed=4)))


def test_fewer_steps_use_times_of_the_schedule():
    sde = MeanRevertingSDE(10.0)
    times = []

    def estimate(state, time):
        times.append(time)
        return torch.zeros_like(state)

    sample(sde, estimate, torch.rand(1, 3, 4, 4), Sampling("mrs-ode2", 10))
    assert times == [100, 90, 80, 70, 60, 50, 40, 30, 20, 10]
    assert visited_times(sde, None) == list(range(100, -1, -1))
    for steps in range(1, 101):
        times = visited_times(sde, steps)
        assert times[0] == 100
        assert times[-1] == 0
        assert len(set(times)) == steps + 1
    with pytest.raises(DerainError, match="steps 101"):
        visited_times(sde, 101)


def test_states_start_with_noise_and_end_with_the_result(pair):
    _, rainy = pair
    sde = MeanRevertingSDE(10.0)
    sampling = Sampling("posterior", 5)
    path = list(states(sde, gaussian(sde, rainy), rainy, sampling))
    assert len(path) == 6
    assert float((path[0] - rainy).std()) == pytest.approx(sde.scale, rel=0.02)
    assert torch.equal(path[-1], sample(sde, gaussian(sde, rainy), rainy, sampling))


def test_steps_are_shown(pair):
    _, rainy = pair
    sde = MeanRevertingSDE(10.0)
    shown = []

    def show(steps, total):
        for step in steps:
            shown.append((step, total))
            yield step

    sample(sde, gaussian(sde, rainy), rainy, Sampling("ode", 4), show)
    assert shown == [((100, 75), 4), ((75, 50), 4), ((50, 25), 4), ((25, 0), 4)]


def test_invalid_sampling_options():
    with pytest.raises(DerainError, match="solver euler"):
        DACLIPSDEModule(contexts="none", channels=8, multipliers=(1, 2)).set_sampling(Sampling("euler"))
    with pytest.raises(DerainError, match="steps 0"):
        Sampling(steps=0)
    with pytest.raises(DerainError, match="solver typo"):
        sample(MeanRevertingSDE(50.0), lambda state, t: state, torch.rand(1, 3, 4, 4), Sampling("typo"))


def test_visited_times_are_rounded_to_the_nearest():
    assert visited_times(MeanRevertingSDE(steps=100), 3) == [100, 67, 33, 0]
    assert visited_times(MeanRevertingSDE(steps=10), 4) == [10, 8, 5, 2, 0]
