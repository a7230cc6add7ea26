"""The state of torch's random number generators, to replay a random function or to leave no trace of an observation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of the generators of the CPU and of every CUDA device in use."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]

    @staticmethod
    def now() -> RandomState:
        """Return the present state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        return RandomState(torch.get_rng_state(), tuple(cuda))

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))

    def differs_from(self, other: RandomState) -> bool:
        """Whether anything was drawn between the two states."""
        pairs = zip((self.cpu, *self.cuda), (other.cpu, *other.cuda), strict=True)
        return any(not torch.equal(mine, its) for mine, its in pairs)


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
