"""Book-keeping of a model whose parameters are sharded over processes by FSDP2, ``fully_shard``.

Between passes every process holds a shard of each parameter, a ``DTensor``. Before a module runs, forward or backward,
FSDP gathers its parameters into ordinary ones, which the functions of the model see, and frees their memory after it.
Those are what is intercepted. Autograd computes no gradient for them, so FSDP has nothing to reduce; a gradient that
went past the book would arrive in a shard, where `close` finds it.

Every process has samples of its own and computes with the parameters in full: its norms are complete, its sums are not.

Owns: finding the gathered parameters. Does not own: reducing what was summed (``shards``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_dp.bookkeeping.book import SPARE, Book, Target
from lightning_dp.bookkeeping.engine import BookKeeping
from lightning_dp.bookkeeping.entries import Entry
from lightning_dp.bookkeeping.held import held, reshard, units
from lightning_dp.bookkeeping.observation import Forward
from lightning_dp.bookkeeping.recorder import Recorder
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.shards import ShardOf

Swap = Callable[[str, nn.Parameter], None]

Place = tuple[nn.Module, str, str]
"""A module, the attribute by which it holds a parameter, and the parameter's name."""


class ShardedKeeping(BookKeeping):
    """Per-sample gradients of the trained parameters of a model with ``fully_shard``, of this process's samples.

    Guarantee: as for `BookKeeping`. All processes must run the same passes: FSDP gathers parameters in all of them.

    Args:
        trained: The parameters whose gradients are kept, by name; the module holds all of its parameters as shards.
        others: Further parameters that require a gradient but are not trained: they are treated as constants.
        module: The user's module.

    Attributes:
        shards: How the trained parameters lie.

    Raises:
        PrivacyConfigurationError: If one is not sharded over all processes.
    """

    in_parts = True

    def __init__(
        self, trained: Mapping[str, nn.Parameter], others: Mapping[str, nn.Parameter], module: nn.Module
    ) -> None:
        super().__init__(trained, others)
        self.shards = {name: ShardOf(name, p) for name, p in trained.items()}
        self._module = module
        self._names.clear()  # of shards, which no function of the model sees
        self._swapped.clear()
        self._seen: dict[str, nn.Parameter] = {}
        named = {id(p): name for name, p in [*others.items(), *trained.items()]}
        self._places: dict[Any, list[Place]] = {unit: _places(unit, named) for unit in units(module)}
        for name in trained.keys() - {name for places in self._places.values() for *_, name in places}:
            raise PrivacyConfigurationError(
                f"parameter '{name}' is a DTensor that no module with fully_shard gathers: it is sharded by something "
                "else, such as tensor parallelism. Call fully_shard on a module that holds it, or freeze it."
            )

    def observe(self, forward: Forward, *args: Any, **kwargs: Any) -> None:
        """Observe how the functions that the parameters enter use the samples; arguments as for `BookKeeping`."""

        def gathering(samples: str) -> Any:
            loss = forward(samples)
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.register_hook(self._gather)
            return loss

        with warnings.catch_warnings():
            # What is followed is a view, of which FSDP warns; nothing else that runs here is trained by.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            super().observe(gathering, *args, **kwargs)
        reshard(self._module)

    def _gather(self, gradient: Tensor) -> Tensor:
        """Gather all parameters for a backward pass in which a module may do so too late: see the warning above."""
        for unit in self._places:
            unit.unshard()
        return gradient

    def close(self) -> Book:
        """End the pass and return its book; a parameter that was not resharded may have a gradient of its own."""
        for name in self._trained.keys() & self._seen.keys():
            if self._seen[name].grad is not None:
                self._seen[name].grad = None
                raise self.escape_of(name)
        return super().close()

    @property
    def coarse(self) -> bool:  # type: ignore[override]
        """Whether a parameter was gathered in 16 bits."""
        return any(p.dtype.itemsize == 2 for p in self._seen.values())

    def hold(self, name: str, whole: Tensor) -> Tensor:
        """Return this process's shard, on the CPU: several of the whole model are compared."""
        return self.shards[name].share(whole).cpu()

    def add_up(self, numbers: list[float]) -> list[float]:
        """Add up in one collective."""
        device = held(next(iter(self._trained.values()))).device
        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return sums.tolist()

    def _new_recorder(self, num_samples: int) -> Recorder:
        recorder = Recorder(self._names, self._layouts, num_samples, self._is_recording, self._anchor, lasting=False)
        recorder.book = _OwnBook(num_samples, gathered=self._seen.values())
        recorder.book.spare = self._spare
        return recorder

    @cached_property
    def _spare(self) -> int:
        """Elements that per-sample gradients may take: half of the parameters that this process holds."""
        return max(SPARE, sum(held(p).numel() for p in self._trained.values()) // 2)

    @contextmanager
    def _arriving(self, swap: Swap) -> Iterator[None]:
        """Swap parameters when a module is about to run that FSDP has gathered them for; its hook runs before ours."""
        with ExitStack() as hooks:
            for unit, places in self._places.items():
                handle = unit.register_forward_pre_hook(partial(self._gathered, swap, places))
                hooks.callback(handle.remove)
            yield

    def _gathered(self, swap: Swap, places: list[Place], *_: Any) -> None:
        for owner, attribute, name in places:
            parameter = owner._parameters[attribute]
            if parameter is None or isinstance(parameter, DTensor) or self._seen.get(name) is parameter:
                continue
            self._forget(name)
            self._seen[name] = parameter  # a reference, so that its id is no other's
            self._swapped.append((name, parameter))
            if name in self._trained:
                self._names[id(parameter)] = name
            swap(name, parameter)

    def _forget(self, name: str) -> None:
        before = self._seen.pop(name, None)
        if before is not None:
            self._names.pop(id(before), None)
            self._swapped[:] = [(other, p) for other, p in self._swapped if p is not before]


@dataclass
class _OwnBook(Book):
    """Copies what an entry holds of a gathered parameter, such as a trained initial state that enters a product.

    Args:
        gathered: The parameters, whose memory is freed before the book is closed.
    """

    gathered: Iterable[nn.Parameter] = ()

    def file(self, target: Target, entry: Entry) -> None:
        """Add an entry, filed while the parameters that it was made of are still gathered."""
        foreign = {p.untyped_storage()._cdata for p in self.gathered}
        for name, t in vars(entry).items():
            if isinstance(t, Tensor) and t.untyped_storage()._cdata in foreign:
                setattr(entry, name, t.clone())
        super().file(target, entry)


def _places(unit: nn.Module, named: Mapping[int, str]) -> list[Place]:
    """Return where the parameters are held that are gathered for a unit, and not for another one inside it."""
    found: list[Place] = []
    waiting = [unit]
    while waiting:
        m = waiting.pop()
        found += [(m, attribute, named[id(p)]) for attribute, p in m._parameters.items() if id(p) in named]
        waiting += [child for child in m.children() if not isinstance(child, FSDPModule)]
    return found
