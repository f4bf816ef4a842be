"""Mean-reverting SDE compared with golden numbers and with the paper's formulas in float64."""

import math

import pytest
import torch

from derain.errors import DerainError
from derain.methods.daclipsde.sde import MeanRevertingSDE, theta_schedule


def test_golden_numbers():
    sde = MeanRevertingSDE(max_sigma=10.0)
    assert sde.dt == pytest.approx(0.10409380, abs=1e-6)
    chosen = [0, 1, 50, 100]
    assert sde.speed[chosen].tolist() == pytest.approx([6.1429e-4, 1.69456e-3, 0.50615633, 0.99976659], abs=1e-6)
    cumulative = sde.tau / sde.dt
    assert cumulative[[1, 50, 100]].tolist() == pytest.approx([1.69456e-3, 9.792815, 50.899448], abs=1e-5)
    assert sde.marginal_std[[1, 50, 100]].tolist() == pytest.approx([7.36525e-4, 0.0365739, 0.0392152], abs=1e-7)
    volatility = sde.scale * torch.sqrt(2 * sde.speed)
    assert volatility[[1, 50, 100]].tolist() == pytest.approx([2.28299e-3, 0.0394564, 0.0554529], abs=1e-6)
    assert float(sde.decay[100]) == pytest.approx(0.005, abs=1e-12)
    wide = MeanRevertingSDE(max_sigma=50.0)
    torch.testing.assert_close(wide.marginal_std, 5 * sde.marginal_std)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_schedule_ends_at_eps(schedule):
    sde = MeanRevertingSDE(20.0, 30, 0.01, schedule)
    assert sde.steps == 30
    assert float(sde.decay[0]) == 1
    assert float(sde.decay[30]) == pytest.approx(0.01)
    assert (sde.tau.diff() > 0).all()
    assert theta_schedule(schedule, 30).shape == (31,)


def test_speed_of_each_schedule():
    assert theta_schedule("constant", 5).tolist() == [1.0] * 6
    linear = theta_schedule("linear", 10)
    assert float(linear[-1] / linear[0]) == pytest.approx(200)
    torch.testing.assert_close(linear.diff(), linear.diff()[:1].expand(10))
    k, n = 8, 12
    share = math.cos((k / n + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert float(theta_schedule("cosine", 10)[7]) == pytest.approx(1 - share, abs=1e-15)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    clean, rainy, noise = (torch.rand(4, 3, 5, 6, generator=generator) for _ in range(3))
    return clean, rainy, noise * 2 - 1, torch.tensor([1, 2, 50, 100])


def reference(times, max_sigma=10, count=100, eps=0.005):
    """θ, dt, cumulative θ and λ, computed number by number."""
    n = count + 2
    bar = [math.cos((k / n + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(n + 1)]
    theta = [1 - bar[t + 1] / bar[0] for t in range(count + 1)]
    cumulative = [sum(theta[: t + 1]) - theta[0] for t in range(count + 1)]
    dt = -math.log(eps) / cumulative[-1]
    return theta, dt, cumulative, max_sigma / 255


def test_marginals_and_score_equal_the_paper(images):
    clean, rainy, noise, times = images
    sde = MeanRevertingSDE(max_sigma=10.0)
    theta, dt, cumulative, scale = reference(times)
    state = sde.diffuse(clean, rainy, times, noise)
    score = sde.score(noise, times)
    for i, t in enumerate(times.tolist()):
        x0, mu, z = (images[i].double() for images in (clean, rainy, noise))
        mean = mu + (x0 - mu) * math.exp(-cumulative[t] * dt)
        deviation = scale * math.sqrt(1 - math.exp(-2 * cumulative[t] * dt))
        torch.testing.assert_close(sde.mean(clean, rainy, times)[i].double(), mean, atol=1e-6, rtol=0)
        torch.testing.assert_close(state[i].double(), mean + deviation * z, atol=1e-6, rtol=0)
        # eq. 10: -(x - m) / v
        torch.testing.assert_close(score[i].double(), -(deviation * z) / deviation**2, atol=0, rtol=1e-5)
    torch.testing.assert_close(sde.clean(state, rainy, noise, times), clean, atol=1e-4, rtol=0)
    assert theta[0] > 0


def test_reverse_steps_equal_the_paper(images):
    clean, rainy, noise, times = images
    sde = MeanRevertingSDE(max_sigma=10.0)
    theta, dt, cumulative, scale = reference(times)
    state = sde.diffuse(clean, rainy, times, noise)
    score = sde.score(noise, times)
    euler = sde.euler(state, rainy, score, times, times - 1)
    flow = sde.euler(state, rainy, score, times, times - 1, ode=True)
    posterior_mean = sde.posterior_mean(state, clean, rainy, times, times - 1)
    for i, t in enumerate(times.tolist()):
        x, x0, mu, s = (images[i].double() for images in (state, clean, rainy, score))
        variance = 2 * scale**2 * theta[t]
        expected = x - (theta[t] * (mu - x) - variance * s) * dt
        torch.testing.assert_close(euler[i].double(), expected, atol=1e-6, rtol=0)
        expected = x - (theta[t] * (mu - x) - 0.5 * variance * s) * dt
        torch.testing.assert_close(flow[i].double(), expected, atol=1e-6, rtol=0)
        a, b = math.exp(-theta[t] * dt), math.exp(-cumulative[t] * dt)
        c = math.exp(-cumulative[t - 1] * dt)
        expected = mu + a * (1 - c**2) / (1 - b**2) * (x - mu) + c * (1 - a**2) / (1 - b**2) * (x0 - mu)
        torch.testing.assert_close(posterior_mean[i].double(), expected, atol=1e-6, rtol=0)
        variance = scale**2 * (1 - a**2) * (1 - c**2) / (1 - b**2)
        assert float(sde.posterior_std(times, times - 1)[i]) == pytest.approx(math.sqrt(max(variance, 0)), abs=1e-12)


def test_posterior_mean_and_std_equal_a_regression():
    """Regress x(s) on x(t) and x(0) of sampled paths: coefficients and residual are those of the posterior."""
    sde = MeanRevertingSDE(max_sigma=100.0)
    generator = torch.Generator().manual_seed(0)
    count, t, s = 400_000, 60, 40
    clean = torch.rand(count, generator=generator, dtype=torch.float64)
    step = float(sde.tau[t] - sde.tau[s])
    z = torch.randn(2, count, generator=generator, dtype=torch.float64)
    earlier = clean * sde.decay[s] + sde.marginal_std[s] * z[0]
    later = earlier * math.exp(-step) + sde.std(torch.tensor(step, dtype=torch.float64)) * z[1]
    step_times = torch.tensor([t]), torch.tensor([s])
    unit, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    expected = [float(sde.posterior_mean(x, y, zero, *step_times)) for x, y in ((unit, zero), (zero, unit))]
    regressors = torch.stack((later, clean), 1)
    coefficients = torch.linalg.lstsq(regressors, earlier[:, None]).solution[:, 0]
    assert coefficients.tolist() == pytest.approx(expected, abs=5e-3)
    residual = earlier - regressors @ coefficients
    assert float(residual.std()) == pytest.approx(float(sde.posterior_std(*step_times)[0]), rel=5e-3)


def test_formulas_return_float32(images):
    clean, rainy, noise, times = images
    sde = MeanRevertingSDE(max_sigma=10.0)
    state = sde.diffuse(clean, rainy, times, noise)
    rough = noise.bfloat16()
    assert sde.clean(state, rainy, rough, times).dtype == torch.float32
    assert sde.euler(state, rainy, sde.score(rough, times), times, times - 1).dtype == torch.float32


def test_state_rebuilds_the_schedule_exactly():
    sde = MeanRevertingSDE(10.0, 40, 0.01, "linear")
    again = MeanRevertingSDE.from_state(sde.state())
    assert torch.equal(again.tau, sde.tau)
    assert torch.equal(again.marginal_std, sde.marginal_std)
    assert again.scale == sde.scale


@pytest.mark.parametrize(
    ("options", "value"),
    [({"max_sigma": 0.0}, "max_sigma 0"), ({"steps": 0}, "sde_steps 0"), ({"eps": 1.0}, "eps 1.0")],
)
def test_options_out_of_range(options, value):
    with pytest.raises(DerainError, match=value):
        MeanRevertingSDE(**options)


def test_precondition_is_the_best_linear_estimate():
    sde = MeanRevertingSDE(10.0)
    generator = torch.Generator().manual_seed(0)
    residual = 0.1 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    for t in (1, 40, 80, 100):
        factors = sde.precondition(torch.tensor([t]), 0.1, torch.zeros(1, 3, 1, 1))
        scale, slope, error = (float(factor) for factor in factors)
        distance = sde.decay[t] * residual + sde.marginal_std[t] * noise
        assert float((scale * distance).std()) == pytest.approx(1, rel=0.01)
        assert float((distance * noise).mean() / distance.square().mean()) == pytest.approx(slope, rel=0.02, abs=0.1)
        assert float((noise - slope * distance).std()) == pytest.approx(error, rel=0.01)
