"""The processes that train together: what they tell each other, and the errors that one of them must share.

Owns: every collective of this library. Does not own: what is told and when (``strategies``), the process group
(Lightning makes it), or the noise (``noise``). Knows ``torch.distributed`` only.

A private step on W processes is the sum of W clipped sums, each with independent noise of ``1 / sqrt(W)`` of the
standard deviation: the noise of the sum is that of one process, whatever W is.
"""

from __future__ import annotations

import pickle
import random
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from lightning_dp.buckets import add_up
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.meeting import Meeting
from lightning_dp.noise import SecretRandom, SharedRandom

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

T = TypeVar("T")


class Processes:
    """A single process: every method is the identity, and ``torch.distributed`` is never touched."""

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that decides, and writes to disk."""
        return self.rank == 0

    @property
    def num_here(self) -> int:
        """How many of the processes are on this machine."""
        return 1

    def broadcast(self, value: T) -> T:
        """Return the value that the first process has given."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the values that all processes have given, by rank."""
        return [value]

    def decide(self, compute: Callable[[], T]) -> T:
        """Return, or raise, what ``compute`` does in the first process; in the others it is not called."""
        return compute()

    def together(self, compute: Callable[[], T]) -> T:
        """Return what ``compute`` does here; raise if it does in any process, so that no other one waits for it."""
        return compute()

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Check that all processes have the same facts, of which each has a name.

        Raises:
            PrivacyConfigurationError: If they do not; in all of them.
        """

    def add_up(self, tensors: Iterable[Tensor], what: str = "") -> None:
        """Replace every tensor by its sum over all processes, bitwise the same in each.

        Args:
            tensors: Contiguous, in the same order everywhere.
            what: Says what is added up, which must be the same thing everywhere.

        Raises:
            PrivacyError: If it is not; nothing was added up then.
        """

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their means over all processes, which have the same parameters in the same order.

        Where only some processes have one, it is zero in the others; for gradients that are not private.
        """

    def share(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace every tensor by that of the first process.

        Raises:
            PrivacyConfigurationError: If they have not the same names and shapes everywhere, or none yet.
        """

    def common_random(self, own: SecretRandom) -> Callable[[int], SecretRandom | SharedRandom]:
        """Return what gives secret random numbers by the number of a step, the same in all processes.

        In a single process they are always ``own``, whatever the number.
        """
        return lambda _: own

    def check_weights(self, weights: Iterable[Tensor]) -> None:
        """Check that all processes have the same values.

        Raises:
            PrivacyError: If they do not.
        """

    def seed_alike(self) -> None:
        """Let the generators of torch, Python and NumPy draw the same in all processes."""

    def meet(self, what: str) -> None:
        """Wait for the other processes, and hear what they have noted.

        Args:
            what: Says where they are, which must be the same place.

        Raises:
            PrivacyError: If it is not; if one of them has failed.
        """

    def note(self, number: int) -> None:
        """Let all processes hear of a positive number, when they next tell each other anything."""

    def heard(self) -> list[int]:
        """Return the numbers that any process had noted, each once: the same ones in all processes."""
        return []

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error that ends this process alone, so that they do not wait for it."""


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What a computation returned or raised."""

    value: T | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, compute: Callable[[], T]) -> _Outcome[T]:
        try:
            return cls(compute())
        except Exception as error:  # told to the others, and raised
            return cls(error=error)

    def get(self) -> T:
        if self.error is not None:
            raise self.error
        return cast(T, self.value)


class ProcessGroup(Processes):
    """Several processes, of the process group that Lightning has made.

    Guarantee: what is secret (keys of draws, sums before they are added up) is told to these processes only, and kept
    nowhere; whoever listens on the network between them is not covered.

    Args:
        device: Of this process: where collectives take place.
        timeout: How long to wait for other processes; ``None`` for the default of the backend.
    """

    def __init__(self, device: torch.device, timeout: timedelta | None = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device, self._meeting = device, Meeting(device, timeout)

    @property
    def num_here(self) -> int:
        """Count the processes that say the same name of their machine."""
        return self.gather(socket.gethostname()).count(socket.gethostname())

    def broadcast(self, value: T) -> T:
        """Tell all processes the value of the first one."""
        self._meeting.check("broadcast")
        told = [value if self.is_first else None]
        dist.broadcast_object_list(told, 0)
        return value if self.is_first else cast(T, told[0])

    def gather(self, value: T) -> list[T]:
        """Tell all processes the values of all; tensors in them come on the CPU."""
        self._meeting.check("gather")
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, tree_map_only(Tensor, Tensor.cpu, value))
        return told

    def decide(self, compute: Callable[[], T]) -> T:
        """Compute in the first process, and tell the others."""
        told = self.broadcast(_portable(_Outcome.of(compute)) if self.is_first else None)
        return cast("_Outcome[T]", told).get()

    def together(self, compute: Callable[[], T]) -> T:
        """Compute everywhere, and tell of errors."""
        outcome = _Outcome.of(compute)
        errors = self.gather(_portable(_Outcome(error=outcome.error)).error)
        value = outcome.get()
        for error in filter(None, errors):
            raise error
        return value

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Compare the facts of all processes."""
        everywhere = self.gather(dict(facts))
        for name in facts:
            values = [its.get(name) for its in everywhere]
            if any(value != values[0] for value in values):
                raise PrivacyConfigurationError(
                    f"{name} is not the same in all {self.size} processes: {', '.join(map(_shown, values))}, by rank. "
                    "Every process must run the same script with the same settings on the same data."
                )

    def add_up(self, tensors: Iterable[Tensor], what: str = "") -> None:
        """Add up in buckets of bounded size."""
        self._meeting.check(f"add up {what}")
        add_up(tensors, self._device)

    def check_weights(self, weights: Iterable[Tensor]) -> None:
        """Compare sums of their bits: a unit's gradient must not depend on the process that it comes to."""
        sums = [_bits(weight) for weight in weights]
        told = str(torch.stack([one.to(self._device) for one in sums]).tolist()) if sums else ""
        self._meeting.check(
            "compare weights",
            told,
            "the weights are no longer the same in all processes: something else than the released gradients has "
            "changed them, or the learning rate, in some of them. Log what a scheduler follows with sync_dist=True, "
            "change weights on all ranks alike, and train on devices of one kind.",
        )

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up those that some process has, and divide."""
        every = list(parameters)
        used = set().union(*self.gather({k for k, p in enumerate(every) if p.grad is not None}))
        having = [every[k] for k in sorted(used)]
        sums = [_wide(torch.zeros_like(p) if p.grad is None else p.grad) for p in having]
        self.add_up(sums)
        for p, total in zip(having, sums, strict=True):
            p.grad = total.div_(self.size).to(p.dtype)

    def share(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over every tensor of the first process, as ordinary data-parallel training does."""
        self.together(lambda: _check_initialized(tensors))
        self.check_alike({"the module": [(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()]})
        for tensor in tensors.values():
            value = tensor.detach().to(self._device).contiguous()
            dist.broadcast(value.view(-1).view(torch.uint8), 0)  # not every backend knows every type
            tensor.detach().copy_(value)

    def common_random(self, own: SecretRandom) -> Callable[[int], SharedRandom]:
        """Draw a key of 128 bits in the first process; with the number of a step it begins a generator."""
        key = self.broadcast(secrets.randbits(128))
        return lambda step: SharedRandom(key, step)

    def seed_alike(self) -> None:
        """Seed them by the same number."""
        seed = self.broadcast(secrets.randbits(31))
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def meet(self, what: str) -> None:
        """Exchange some numbers."""
        self._meeting.check(what)

    def note(self, number: int) -> None:
        """Keep it until then."""
        self._meeting.note(number)

    def heard(self) -> list[int]:
        """Return what the last meeting has told."""
        return self._meeting.heard()

    def fail(self, error: BaseException) -> None:
        """Wait for them some seconds."""
        self._meeting.fail(error)


def processes_of(size: int, device: torch.device, timeout: timedelta | None) -> Processes:
    """Return the processes that train together.

    Args:
        size: How many there are; their process group is there, if there are several.
        device: Of this one.
        timeout: How long to wait for the others; ``None`` for the default of the backend.
    """
    return Processes() if size == 1 else ProcessGroup(device, timeout)


def _wide(gradient: Tensor) -> Tensor:
    """Return a gradient in which sums are not rounded to 16 bits."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()


def _bits(t: Tensor) -> Tensor:
    """Return the sum of the bits of all elements, as whole numbers; it is the same in every order of adding."""
    real = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return real.contiguous().view(_BITS[real.element_size()]).sum(dtype=torch.int64)


def _check_initialized(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise PrivacyConfigurationError(
                f"'{name}' has no values yet, so that they cannot be made the same in all processes. Run the module on "
                "a batch in configure_model(), or train on one device."
            )


def _portable(outcome: _Outcome[T]) -> _Outcome[T]:
    """Return what can be told: an error that cannot be pickled only by its name and text."""
    try:
        pickle.loads(pickle.dumps(outcome))
    except Exception as reason:  # whatever a class of the user's does
        if outcome.error is not None:
            return _Outcome(error=PrivacyError(f"{type(outcome.error).__name__}: {outcome.error}"))
        return _Outcome(
            error=PrivacyConfigurationError(
                f"what the first process has settled cannot be told to the others ({reason}). Define the classes of a "
                "clipping or an accountant of your own at the top of a module."
            )
        )
    return outcome


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
