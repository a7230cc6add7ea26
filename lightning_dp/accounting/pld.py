"""Accounting by privacy loss distributions: Google's ``dp-accounting``, an optional second opinion.

Owns: the choice of its grid, bounded in points and time, and the checks that send a doubtful result to the Renyi
accountant. Does not own: discretisation and composition, which are ``dp-accounting``'s; the fallback (``fallback``).

Doroshenko et al. 2022 (arXiv 2207.04380), algorithm 1: losses are moved to the points of a grid of mesh ``h`` such that
``delta(epsilon)`` is exact on the points and larger between them. So every grid gives an upper bound, and a coarser one
a larger: the variance of the losses grows by ``h^2 / 6`` a release at most. The library is imported when it is needed.
"""

import importlib.util
import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Any

import numpy as np
from scipy.special import ndtri

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.fallback import Engine, NumericsError, least_epsilon
from lightning_dp.accounting.gaussian import full_batch_epsilon, full_batch_noise, is_full
from lightning_dp.accounting.phases import Kind, Phase
from lightning_dp.accounting.rdp import ORDERS, RDPAccountant, composed_divergences
from lightning_dp.errors import PrivacyConfigurationError

# Grid points for one standard deviation of a release's loss; the bound is then at most about 0.1 % above the truth.
FINE = 20.0
# Of all single releases together, and of their composition; what would need more gets a coarser grid.
_MOST_SINGLE_POINTS, _MOST_POINTS = 2.0**18, 2.0**20
# Below this the library's double precision shows.
_LEAST_DELTA = 1e-12
# Rounding in the Fourier transform grows into delta by so much per release and machine epsilon; measured: below 1.
_ROUNDING = 8.0
# Share of delta for the mass that is moved to infinite loss, and the most of it that rounding may take.
_TAIL_SHARE, _ROUNDING_SHARE = 1e-4, 0.1
# Rounding leaves too much mass on a fine grid, never too little. This much of it in all hardly raises epsilon.
_MOST_EXCESS = 0.02
# Stands for minus infinity.
_LEAST_LOSS = -700.0
# The mesh is at most this share of epsilon.
_EPSILON_SHARE = 2e-3
# Chi-square divergences beyond this say nothing about the losses that matter.
_MOST_EXPONENT = 50.0


def dp_accounting_installed() -> bool:
    """Whether the optional library is there; it is not imported."""
    return importlib.util.find_spec("dp_accounting") is not None


class PLDAccountant(Accountant):
    """Privacy loss distributions by Google's ``dp-accounting``, at most about 0.1 % above the truth in common settings.

    Guarantee:
        See :class:`Accountant`; no further precondition. Both directions of the neighbouring relation are composed and
        the larger epsilon counts; never above the Renyi bound.

        =================================== ====================================
        case                                how
        =================================== ====================================
        all rates 1                         exact closed form
        delta below 1e-12                   Renyi
        delta below what floats resolve     Renyi
        more grid points than are allowed   a coarser grid, still an upper bound
        =================================== ====================================

    Raises:
        PrivacyConfigurationError: If ``dp-accounting`` is not installed.
    """

    name = "pld"

    def __init__(self) -> None:
        if not dp_accounting_installed():
            raise PrivacyConfigurationError(
                'accountant="pld" needs the library dp-accounting, which is not installed. Install it with '
                '`pip install "lightning-dp[pld]"`, or use accountant="prv", which is as tight, or "rdp".'
            )

    def _epsilon(self, phases: tuple[Phase, ...], delta: float) -> float:
        exact = full_batch_epsilon(phases, delta)
        return _fallback_epsilon(phases, delta) if exact is None else exact


@lru_cache(maxsize=4096)
def _fallback_epsilon(phases: tuple[Phase, ...], delta: float) -> float:
    return least_epsilon(phases, delta, [Engine("pld", pld_epsilon)])


def pld_epsilon(phases: tuple[Phase, ...], delta: float) -> float:
    """Epsilon by privacy loss distributions, on a fine grid or the finest there is time for.

    Args:
        phases: Distinct, noisy, not empty.
        delta: In (0, 1).

    Returns:
        An upper bound in nats.

    Raises:
        NumericsError: If it cannot be had.
    """
    return composed_epsilon(phases, delta, FINE)[0]


@lru_cache(maxsize=256)
def composed_epsilon(phases: tuple[Phase, ...], delta: float, fineness: float) -> tuple[float, float]:
    """Epsilon by privacy loss distributions, and the fineness of the grid that it was computed on.

    Args:
        phases: Distinct, noisy, not empty.
        delta: In (0, 1).
        fineness: Grid points aimed at for one standard deviation of a release's loss.

    Returns:
        An upper bound in nats, and the fineness had, which is less where the grid would have been too large.

    Raises:
        NumericsError: If it cannot be had.
    """
    phases = _without_full_batches(phases)
    count = sum(phase.num_releases for phase in phases)
    rounding = _ROUNDING * count * float(np.finfo(np.float64).eps)
    _require(delta >= _LEAST_DELTA, "delta is too small for double precision", f"{delta:.3g}")
    _require(rounding <= _ROUNDING_SHARE * delta, "delta drowns in rounding", f"{delta:.3g}, {count} releases")
    # By the next power of two, so that a search finds the single releases in the cache.
    log_tail = math.log(_TAIL_SHARE * delta) - math.log(2) * (count - 1).bit_length()
    deviation = _deviation(phases, count)
    mesh, singles = _discretised(phases, _meshes(phases, delta, deviation / fineness, log_tail), log_tail)
    epsilon = float(_composed(phases, singles, delta).get_epsilon_for_delta(delta - rounding))
    _require(math.isfinite(epsilon), "no finite epsilon")
    return epsilon, deviation / mesh


def _discretised(phases: Sequence[Phase], meshes: Sequence[float], log_tail: float) -> tuple[float, list[Any]]:
    """The losses of one release of each phase, on the first grid that is not spoilt by rounding."""
    excess = 0.0
    for mesh in meshes:
        singles = [_single(phase.kind, mesh, log_tail) for phase in phases]
        # At a loss of minus infinity delta is the whole mass, which is 1 but for rounding.
        masses = [float(single.get_delta_for_epsilon(_LEAST_LOSS)) for single in singles]
        excess = sum(phase.num_releases * max(0.0, mass - 1) for phase, mass in zip(phases, masses, strict=True))
        if excess <= _MOST_EXCESS:
            return mesh, singles
    raise NumericsError("no grid is free of rounding", f"{excess:.2g} too much mass")


def _composed(phases: Sequence[Phase], singles: Sequence[Any], delta: float) -> Any:
    """The privacy loss distribution of all releases."""
    tail = _TAIL_SHARE * delta  # moved to infinite loss, each time
    several = [
        single if phase.num_releases == 1 else single.self_compose(phase.num_releases, tail)
        for phase, single in zip(phases, singles, strict=True)
    ]
    return reduce(lambda one, other: one.compose(other, tail), several)


def _without_full_batches(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """All full batches as the one Gaussian release that they are as informative as."""
    sampled = tuple(phase for phase in phases if not is_full(phase))
    full = [phase for phase in phases if is_full(phase)]
    return (*sampled, Phase(full_batch_noise(full), 1.0, 1)) if full else sampled


def _deviation(phases: Sequence[Phase], count: int) -> float:
    """The standard deviation of one release's loss, all releases taken together; exact where losses are small."""
    variance = sum(p.num_releases * p.sample_rate**2 * math.expm1(_exponent(p.noise_multiplier)) for p in phases)
    return math.sqrt(variance / count)


def _exponent(noise: float) -> float:
    return min(_MOST_EXPONENT, 1 / noise**2)


def _meshes(phases: Sequence[Phase], delta: float, finest: float, log_tail: float) -> list[float]:
    """Meshes to try, the finest that is wanted and can be afforded first."""
    reaches = [_reach(phase, log_tail) for phase in phases]
    width = sum(_width(phase, reach, delta) for phase, reach in zip(phases, reaches, strict=True))
    # Where few releases lose much, the deviation is that of losses too rare to matter.
    finest = min(finest, _EPSILON_SHARE * RDPAccountant().epsilon(phases, delta))
    first = max(finest, sum(reaches) / _MOST_SINGLE_POINTS, width / _MOST_POINTS)
    # Few distinct meshes, so that a search finds the single releases in the cache.
    return [2.0 ** (math.floor(4 * math.log2(first)) / 4 + more) for more in range(0, 14, 2)]


def _reach(phase: Phase, log_tail: float) -> float:
    """How far apart the least and the greatest loss of one release lie on the grid."""
    noise, rate = phase.kind
    exponent = (0.5 - noise * float(ndtri(0.5 * math.exp(log_tail)))) / noise**2
    if rate == 1:
        return 2 * exponent
    most = math.log(rate) + exponent if exponent > 700 else math.log1p(rate * math.expm1(exponent))
    return most - math.log1p(-rate)


def _width(phase: Phase, reach: float, delta: float) -> float:
    """How wide the composed grid will be: by the library's Chernoff bound, of 1 to 20 divided by the reach."""
    tail, count = math.log(2 / (_TAIL_SHARE * delta)), phase.num_releases
    rates = np.arange(1, 21) / reach
    # Beyond the orders there are losses are tiny and so nearly Gaussian.
    gaussian = count * (1 + rates) * _deviation([Phase(*phase.kind, 1)], 1) ** 2 / 2
    order = np.argsort(ORDERS)
    renyi = np.interp(1 + rates, ORDERS[order], composed_divergences([phase])[order])
    drift = np.where(1 + rates <= ORDERS[-1], renyi, gaussian)
    return min(count * reach, 2 * float(np.min(drift + tail / rates)))


@lru_cache(maxsize=32)
def _single(kind: Kind, mesh: float, log_tail: float) -> Any:
    """The privacy loss distribution of one release, both directions."""
    from dp_accounting.pld import privacy_loss_distribution

    noise, rate = kind
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=mesh, log_mass_truncation_bound=log_tail, sampling_prob=rate
    )


def _require(condition: bool, reason: str, details: str = "") -> None:
    """Give up with a reason."""
    if not condition:
        raise NumericsError(reason, details)
