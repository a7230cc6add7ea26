"""The second opinion: dp-accounting, if it is installed, on releases and on groups of examples.

Owns: the optional dependency on dp-accounting. Does not own: the epsilon that counts (``accounting``).

Privacy loss distributions, discretised so that delta is never too small: arXiv 2207.04380.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from lightning_dp.accounting import Phase

# More kinds of release take minutes; less noise needs more points than there is memory for.
MOST_KINDS, _LEAST_NOISE = 32, 0.1
# Points in the loss of a typical release: the error of epsilon falls with their square.
_FINE, _COARSE = 20, 5


def library() -> str | None:
    """Return the name and the version of dp-accounting; ``None`` if it is not installed."""
    return f"dp-accounting {version('dp-accounting')}" if _module() is not None else None


def reason_against(phases: Sequence[Phase]) -> str | None:
    """Return why dp-accounting is not asked about these releases; ``None`` if it can be."""
    if _module() is None:
        return "dp-accounting is not installed: pip install 'lightning-dp[pld]'"
    if len(phases) > MOST_KINDS:
        return f"{len(phases)} kinds of release: more than {MOST_KINDS} take too long"
    least = min((phase.noise_multiplier for phase in phases), default=1.0)
    return f"noise multiplier {least:g}: too little for a grid" if least < _LEAST_NOISE else None


@lru_cache(maxsize=64)
def pld_epsilon(phases: tuple[Phase, ...], delta: float, num_examples: int = 1) -> float:
    """Return epsilon by dp-accounting alone: an upper bound, in nats.

    Adding ``k`` examples changes a Poisson sampled sum by at most the sensitivity times a binomial number, and the
    worst case is that of a mixture of Gaussians on a line (arXiv 2310.15526).

    Args:
        phases: All releases; ask `reason_against` first.
        delta: In (0, 1).
        num_examples: k, how many examples are added or removed together.
    """
    module = _module()
    assert module is not None, "asked before"
    mesh = min((_mesh(phase, num_examples) for phase in phases), default=1e-4)
    accountant = module.pld.PLDAccountant(value_discretization_interval=mesh)
    for phase in phases:
        accountant.compose(_event(module, phase, num_examples), phase.num_releases)
    return float(accountant.get_epsilon(delta))


def _mesh(phase: Phase, num_examples: int) -> float:
    noise, rate = phase.noise_multiplier, phase.sample_rate
    # The spread of the loss, for small losses and for large ones.
    spread = num_examples * min(rate * math.sqrt(math.expm1(min(1 / noise**2, 50.0))), 1 / noise)
    return max(spread / (_FINE if num_examples == 1 else _COARSE), 1e-6)


def _event(module: Any, phase: Phase, num_examples: int) -> Any:
    noise, rate = phase.noise_multiplier, phase.sample_rate
    if num_examples == 1:
        gaussian = module.GaussianDpEvent(noise)
        return gaussian if rate == 1 else module.PoissonSampledDpEvent(rate, gaussian)
    chances = [math.comb(num_examples, i) * rate**i * (1 - rate) ** (num_examples - i) for i in range(num_examples + 1)]
    likely = [(float(i), chance) for i, chance in enumerate(chances) if chance > 0]
    return module.dp_event.MixtureOfGaussiansDpEvent(noise, *map(list, zip(*likely, strict=True)))


@lru_cache(maxsize=1)
def _module() -> Any:
    """The module, or ``None``."""
    try:
        import dp_accounting
        import dp_accounting.pld
    except ImportError:
        return None
    return dp_accounting
