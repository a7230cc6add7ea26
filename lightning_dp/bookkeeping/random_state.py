"""The state of torch's random number generators, to replay a random function or to leave no trace of an observation."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of torch's generators of the CPU and of every CUDA device in use, and of Python's and NumPy's."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    python: Any = None
    numpy: Any = None

    @staticmethod
    def now() -> RandomState:
        """Return the present state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return RandomState(torch.get_rng_state(), tuple(cuda))

    @staticmethod
    def of_all() -> RandomState:
        """Return the present state with those of Python and NumPy, by which layers may be dropped."""
        now, numpy = RandomState.now(), sys.modules.get("numpy")
        return RandomState(now.cpu, now.cuda, random.getstate(), numpy and numpy.random.get_state(legacy=False))

    def restore(self) -> None:
        """Set the generators to this state."""
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))

    def differs_from(self, other: RandomState) -> bool:
        """Whether anything was drawn between the two states."""
        pairs = zip((self.cpu, *self.cuda), (other.cpu, *other.cuda), strict=True)
        return any(not torch.equal(mine, its) for mine, its in pairs) or self.differs_elsewhere_from(other)

    def differs_elsewhere_from(self, other: RandomState) -> bool:
        """Whether Python or NumPy have drawn anything between the two states."""
        return self.python != other.python or _plain(self.numpy) != _plain(other.numpy)


def seed_elsewhere(seed: int) -> None:
    """Let Python and NumPy draw what a seed decides; leave them as they are for the seed 0."""
    if seed:
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)


def _plain(numpy: Any) -> Any:
    """Return NumPy's state as something that can be compared."""
    if isinstance(numpy, dict):
        return {name: _plain(value) for name, value in numpy.items()}
    return numpy.tolist() if hasattr(numpy, "tolist") else numpy


@contextmanager
def replaying(state: RandomState | None) -> Iterator[None]:
    """Draw once more what was drawn after ``state``; afterwards the generators are where they were."""
    if state is None:
        yield
        return
    before = RandomState.now()
    state.restore()
    try:
        yield
    finally:
        before.restore()
