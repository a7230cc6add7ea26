"""What the tests of the accounting compare with: Google's dp-accounting, and formulas written down a second time."""

import math

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from scipy.integrate import quad
from scipy.stats import norm

Releases = list[tuple[float, float, int]]
"""``(sample_rate, noise_multiplier, num_releases)``."""

# sample_rate, noise_multiplier, releases, delta, dp-accounting's PLD, upper bound of the PRV accountant at error 0.01
GOLDEN = [
    (0.01, 1, 1, 1e-5, 0.19945, 0.20956),
    (1, 1, 1, 1e-5, 4.3772, 4.3874),
    (1, 20, 100, 1e-5, 1.9931, 2.0032),
    (0.001, 1, 1000, 1e-5, 0.14892, 0.15894),
    (0.01, 1, 1000, 1e-5, 1.8282, 1.8384),
    (0.01, 1, 10000, 1e-5, 6.1877, 6.1980),
    (0.01, 0.8, 1000, 1e-5, 3.1410, 3.1513),
    (0.1, 2, 1000, 1e-5, 8.2793, 8.2897),
    (0.1, 5, 1000, 1e-8, 3.5802, 3.5903),
    (0.1, 0.5, 10, 1e-5, 12.261, 12.272),
    (0.2, 8, 30000, 1e-5, 27.286, 27.297),
    (256 / 60000, 1.1, 14062, 1e-5, 2.3817, 2.3917),
]


def pld_epsilon(releases: Releases, delta: float) -> float:
    """Epsilon by dp-accounting's privacy loss distributions: an upper bound, tight to about 1e-3."""
    meshes = [rate * math.sqrt(math.expm1(min(1 / noise**2, 50.0))) / 20 for rate, noise, _ in releases]
    accountant = PLDAccountant(value_discretization_interval=float(np.clip(min(meshes), 1e-6, 1e-4)))
    for rate, noise, count in releases:
        event = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(event if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, event), count)
    return float(accountant.get_epsilon(delta))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Delta of the Gaussian mechanism, by integrating the hockey-stick divergence of N(mu, 1) from N(0, 1)."""
    start = epsilon / mu + mu / 2
    return float(
        quad(lambda x: norm.pdf(x - mu) - math.exp(epsilon) * norm.pdf(x), start, start + 12, epsabs=0, epsrel=1e-10)[0]
    )


def random_settings(count: int, seed: int) -> list[tuple[float, float, int, float]]:
    """Random ``(sample_rate, noise_multiplier, num_releases, delta)`` with epsilon between about 0.1 and 20."""
    random = np.random.default_rng(seed)
    settings: list[tuple[float, float, int, float]] = []
    while len(settings) < count:
        rate, noise = float(10 ** random.uniform(-4, -0.3)), float(10 ** random.uniform(-0.35, 1.2))
        steps, delta = int(10 ** random.uniform(0, 3.7)), float(10 ** random.uniform(-9, -4))
        # A rough guess of epsilon, by the central limit theorem; it keeps tiny and huge ones away.
        mu = rate * math.sqrt(steps * math.expm1(1 / noise**2))
        if 0.05 < mu * math.sqrt(2 * math.log(1 / delta)) < 15:
            settings.append((rate, noise, steps, delta))
    return settings
