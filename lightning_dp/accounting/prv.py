"""Accounting by privacy random variables: tight, with Microsoft's ``prv-accountant`` underneath.

Owns: grid, composition in Fourier space, reading epsilon off the composition, and the checks that send a doubtful
result to the Renyi accountant. Does not own: the loss of one release (``losses``), the fallback (``rdp``).

Gopi, Lee, Wutschitz 2021, theorem 5.5: let the losses ``Y_i`` be truncated to ``[-L, L]``, rounded to a grid of mesh
``h`` with their means kept, and summed modulo ``2L``. Then ``delta(epsilon) <= delta_grid(epsilon - h sqrt(n/2
log(12/d))) + d`` if ``d`` covers (Hoeffding) ``d/6`` for the rounding and as much for its effect on wrapping,
``P[|sum Y_i| > L - eps_error]`` and twice ``sum_i P[|Y_i| > L]``. Here the last two are ``d/4`` each, by ``loss_tail``.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from prv_accountant.discretisers import CellCentred
from prv_accountant.domain import Domain
from scipy.fft import irfft, next_fast_len, rfft

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.fallback import Engine, NumericsError, least_epsilon
from lightning_dp.accounting.gaussian import full_batch_epsilon, is_full
from lightning_dp.accounting.losses import TruncatedLoss
from lightning_dp.accounting.phases import Kind, Phase
from lightning_dp.accounting.pld import dp_accounting_installed, pld_epsilon
from lightning_dp.accounting.rdp import RDPAccountant, loss_tail

# Error aimed at relative to epsilon, and on the first, coarse grid; larger where that would need too many points.
_RELATIVE_ERROR, _COARSE_ERROR = 0.004, 0.02
_MOST_POINTS = 2**21
# Wider losses and less noise than these are left to other accountants.
_WIDEST = 600.0
_LEAST_NOISE = 0.02
# Rounding in the Fourier transform grows into delta by so much per release and machine epsilon; measured: below 0.7.
_ROUNDING = 8.0
# Share of delta for the error of theorem 5.5, and for rounding of the single masses.
_DELTA_SHARE, _MASS_SHARE = 1e-3, 1e-5
# Components below e^-80 of the composed spectrum cannot be seen, not even in extended precision.
_INVISIBLE = -80.0


class PRVAccountant(Accountant):
    """Numerical composition, at most about 1 % above the truth in common settings; never above the Renyi bound.

    Guarantee:
        See :class:`Accountant`; no further precondition. Both directions of the neighbouring relation are composed and
        the larger epsilon counts. Where the numerics cannot be trusted, it is logged once, and another accountant
        answers: "pld" if it is installed and its numerics hold, else "rdp".

        ======================================= ==========================
        case                                    how
        ======================================= ==========================
        all rates 1                             exact closed form
        noise below 0.02, epsilon above ~300    another
        delta below what floats resolve         another
        ======================================= ==========================
    """

    name = "prv"

    def _epsilon(self, phases: tuple[Phase, ...], delta: float) -> float:
        exact = full_batch_epsilon(phases, delta)
        return _fallback_epsilon(phases, delta) if exact is None else exact


@lru_cache(maxsize=4096)
def _fallback_epsilon(phases: tuple[Phase, ...], delta: float) -> float:
    """The least bound of those that can be had; the other library is asked only where the numerics here fail."""
    others = [Engine("pld", pld_epsilon)] if dp_accounting_installed() else []
    return least_epsilon(phases, delta, [Engine("prv", prv_epsilon), *others])


def prv_epsilon(phases: tuple[Phase, ...], delta: float) -> float:
    """Epsilon by privacy random variables.

    Args:
        phases: Distinct, noisy, not empty.
        delta: In (0, 1).

    Returns:
        An upper bound in nats.

    Raises:
        NumericsError: If it cannot be had; other arithmetic errors mean the same.
    """
    buckets = tuple((phase.kind, _bucket(phase.num_releases)) for phase in phases)
    counts = [phase.num_releases for phase in phases]
    return max(engine.epsilon(counts) for engine in _engines(buckets, delta))


def _bucket(count: int) -> int:
    """The next power of two: a grid made for it serves every smaller count, so a run needs few grids."""
    return 1 << (count - 1).bit_length()


@lru_cache(maxsize=4)
def _engines(buckets: tuple[tuple[Kind, int], ...], delta: float) -> tuple["_Engine", ...]:
    """The discretised losses for both directions, for up to so many releases of each kind."""
    phases = [Phase(*kind, most) for kind, most in buckets]
    phases = [Phase(phase.noise_multiplier, 1.0, phase.num_releases) if is_full(phase) else phase for phase in phases]
    _require(min(phase.noise_multiplier for phase in phases) >= _LEAST_NOISE, "too little noise for a grid")
    # By half the bucket, so that the error aimed at does not shrink on the way to the next, and epsilon only grows.
    halves = [Phase(*phase.kind, max(1, phase.num_releases // 2)) for phase in phases]
    # The Renyi bound of few or rare releases can be five times too high: a coarse grid tells what is to be resolved.
    coarse_error = _COARSE_ERROR * RDPAccountant().epsilon(halves, delta)
    coarse = _Engine(phases, _grid(phases, delta, coarse_error), delta, adding=False)
    eps_error = _RELATIVE_ERROR * coarse.epsilon([phase.num_releases for phase in halves])
    grid = _grid(phases, delta, eps_error)
    return tuple(_Engine(phases, grid, delta, adding=adding) for adding in (False, True))


class _Grid(NamedTuple):
    """A grid of losses and the error of epsilon it keeps."""

    domain: Domain
    eps_error: float


def _grid(phases: Sequence[Phase], delta: float, eps_error: float) -> _Grid:
    """The grid of theorem 5.5; coarser than asked if there would be too many points."""
    delta_error = _DELTA_SHARE * delta
    count = sum(phase.num_releases for phase in phases)
    single = max(loss_tail([Phase(*phase.kind, 1)], delta_error / (8 * count)) for phase in phases)
    # A quarter is room for the shift that keeps the means, see `_Engine`.
    reach = 1.25 * max(single, loss_tail(phases, delta_error / 4) + eps_error)
    _require(reach <= _WIDEST, "privacy losses too large for a grid", f"up to {reach:.3g}")
    root = math.sqrt(count / 2 * math.log(12 / delta_error))
    mesh = max(eps_error / root, 2 * reach / _MOST_POINTS)
    size = 2 * next_fast_len(math.ceil(reach / mesh) + 2, real=True)
    # `create_aligned` puts 0 on the grid at index size / 2 - 1; half a cell less survives its rounding outwards.
    domain = Domain.create_aligned(-(size / 2 - 1.5) * mesh, (size / 2 - 1.5) * mesh, mesh)
    _require(len(domain) == size, "no aligned grid")
    _require(mesh * root <= reach / 4, "the grid would be too coarse")
    return _Grid(domain, mesh * root)


class _Engine:
    """The discretised losses of some phases in one direction, ready to be composed any number of times."""

    def __init__(self, phases: Sequence[Phase], grid: _Grid, delta: float, *, adding: bool) -> None:
        domain, self._eps_error = grid
        most = [phase.num_releases for phase in phases]
        self._mesh, self._centre, self._size = float(domain.dt()), len(domain) // 2 - 1, len(domain)
        self._real, rounding = _precision(sum(most), delta)
        self._delta = delta * (1 - _DELTA_SHARE - _MASS_SHARE) - rounding
        self._spectra: list[npt.NDArray[np.complexfloating]] = []
        self._shifts: list[float] = []
        for phase in phases:
            self._add(phase, domain, adding)
        room = self._mesh * self._size / 10
        _require(abs(np.dot(self._shifts, most)) <= room, "keeping the mean would shift the losses off the grid")

    def _add(self, phase: Phase, domain: Domain, adding: bool) -> None:
        """Discretise the loss of one phase and keep the logarithm of its spectrum."""
        loss = TruncatedLoss(*phase.kind, adding=adding, t_min=domain.t_min(), t_max=domain.t_max())
        discrete = CellCentred().discretise(loss, domain)
        losses = np.asarray(discrete.domain.ts(), dtype=np.float64)
        masses: npt.NDArray[Any] = np.asarray(discrete.pmf, dtype=self._real)
        total = float(masses.sum())
        _require(phase.num_releases * abs(total - 1) <= _MASS_SHARE, "the masses do not add up to 1")
        masses /= total
        self._check_moment(phase.num_releases, losses, np.asarray(masses, dtype=np.float64))
        spectrum = rfft(np.roll(masses, -self._centre))
        # A component of exactly 0 has no logarithm; the least float is as invisible.
        self._spectra.append(np.log(np.where(spectrum == 0, np.finfo(self._real).tiny, spectrum)))
        self._shifts.append(float(discrete.domain.shifts()))

    def _check_moment(self, count: int, losses: npt.NDArray[np.float64], masses: npt.NDArray[np.float64]) -> None:
        """``E[e^-loss]`` is 1 for every mechanism; a wrong mean or distribution shows here, ``count`` times."""
        defect = count * abs(math.log(float(np.dot(masses, np.exp(-losses)))))
        _require(defect <= self._eps_error / 4, "the moment of the discretised loss is off", f"by {defect:.3g} in all")

    def epsilon(self, counts: Sequence[int]) -> float:
        """The upper bound on epsilon of so many releases of each kind."""
        losses, masses = self._compose(counts)
        tail = np.cumsum(masses[::-1])[::-1]
        # e^epsilon times what the neighbouring dataset puts there; relative to the first loss, so nothing overflows.
        decay = np.exp(losses[0] - losses).astype(self._real)
        other = np.cumsum((masses * decay)[::-1])[::-1]
        deltas = tail - other / decay
        found = int(np.searchsorted(-deltas, -self._delta))
        if found == 0:
            return max(0.0, float(losses[0])) + self._eps_error
        _require(found < len(losses), "delta drowns in rounding", f"{self._delta:.3g}")
        # Between two grid points delta(epsilon) = tail - e^epsilon other holds exactly.
        result = float(losses[0] + np.log((tail[found] - self._delta) / other[found])) + self._eps_error
        _require(math.isfinite(result), "no finite epsilon")
        return result

    def _compose(self, counts: Sequence[int]) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        """Losses from about 0 upwards and their masses."""
        exponent = sum(count * spectrum for count, spectrum in zip(counts, self._spectra, strict=True))
        seen = np.flatnonzero(np.real(exponent) > _INVISIBLE)
        spectrum = np.zeros_like(self._spectra[0])
        spectrum[seen] = np.exp(np.asarray(exponent)[seen])
        masses = np.roll(irfft(spectrum, self._size), self._centre)
        _require(abs(float(masses.sum()) - 1) <= 1e-9, "the composed masses do not add up to 1")
        shift = float(np.dot(self._shifts, counts))
        first = max(0, math.floor(self._centre - shift / self._mesh))
        losses = (np.arange(first, self._size) - self._centre) * self._mesh + shift
        return losses, masses[first:]


def _precision(count: int, delta: float) -> tuple[type, float]:
    """The cheapest float type whose rounding is far below ``delta``, and what to take off ``delta`` for it."""
    for real, share in ((np.float64, 1e-3), (np.longdouble, 0.1)):
        rounding = _ROUNDING * count * float(np.finfo(real).eps)
        if rounding <= share * delta:
            return real, rounding
    raise NumericsError("delta drowns in rounding", f"{delta:.3g}, {count} releases")


def _require(condition: bool, reason: str, details: str = "") -> None:
    """Give up with a reason."""
    if not condition:
        raise NumericsError(reason, details)
