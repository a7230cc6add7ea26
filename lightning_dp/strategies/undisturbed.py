"""Contexts in which a training step can be tried without a trace in buffers, metrics, logs or random numbers.

Owns: what is put back. Does not own: what is tried.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_dp.bookkeeping.held import reshard
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.errors import UnsupportedModelError
from lightning_dp.processes import Processes
from lightning_dp.strategies.memory import give_back_freed
from lightning_dp.strategies.tree import Tree, same
from lightning_dp.strategies.written import Written


@contextmanager
def undisturbed(module: pl.LightningModule, *, attributes: bool = True) -> Iterator[Written]:
    """Put back afterwards: parameters, buffers, plain attributes, metrics, random numbers; inside, ``log`` is silent.

    Args:
        module: The user's module.
        attributes: Whether to put back attributes, too.

    Yields:
        What tells, afterwards, which parameters were written.
    """
    reshard(module)
    written = Written(dict(module.named_parameters()))
    with ExitStack() as stack:
        # Passes of many sizes leave holes in the C library's heap, which came to several times what a pass needs.
        stack.callback(give_back_freed)
        stack.callback(written.undo)
        stack.enter_context(_same_but_for_parameters(module))
        if attributes:
            stack.enter_context(same_attributes(module))
        with written:
            yield written


@contextmanager
def drawing_alike(processes: Processes) -> Iterator[None]:
    """Let all processes draw the same random numbers inside, so that they look at the same and equally often."""
    with same_random_numbers():
        processes.seed_alike()
        yield


@contextmanager
def undisturbed_at_full_speed(module: pl.LightningModule) -> Iterator[None]:
    """Put back the same, for measuring: every parameter is copied beforehand, so that no operator is looked at."""
    copies = [(p, p.data, p.detach().clone()) for p in module.parameters()]
    try:
        with _same_but_for_parameters(module), same_attributes(module):
            yield
    finally:
        for p, data, value in copies:
            p.data = data.copy_(value)


@contextmanager
def _same_but_for_parameters(module: pl.LightningModule) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(same_random_numbers())
        stack.enter_context(_same_buffers(module))
        stack.enter_context(_same_metrics(module))
        for name in ("log", "log_dict"):
            stack.enter_context(_silenced(module, name))
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode inside."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train()  # some modules override it, to drop what they kept for evaluation
        for m, training in modes:
            m.training = training


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Let the generators of torch, Python and NumPy go on afterwards as if nothing had been drawn inside."""
    state = RandomState.of_all()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def _same_buffers(module: nn.Module) -> Iterator[None]:
    saved = [(owner, name, value, value.clone()) for owner, name, value in _buffers(module)]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in saved:
                buffer.copy_(value)
                owner._buffers[name] = buffer


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in module.modules():
        for name, value in owner._buffers.items():
            if value is not None:
                yield owner, name, value


_CONTAINERS = {list, dict, set, deque}
_PLAIN = {bool, int, float, str, type(None), *_CONTAINERS}


@contextmanager
def same_attributes(module: nn.Module) -> Iterator[None]:
    """Put back numbers, flags and containers that modules keep as public attributes: counters, buffers of replay."""
    attributes = Attributes(Tree(module).others)
    try:
        yield
    finally:
        attributes.put_back()


class Attributes:
    """The public attributes of modules as they are now, with the contents of those that are plain containers.

    Args:
        modules: The modules; metrics are put back otherwise, see `_same_metrics`.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._held: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        for m in modules:  # many, in every step
            held = _public(m)
            plain = _CONTAINERS.isdisjoint(map(type, held.values()))
            contents = {} if plain else {n: copy.copy(value) for n, value in held.items() if type(value) in _CONTAINERS}
            self._held.append((m, held, contents))

    def put_back(self) -> None:
        """Give every module its attributes back; of those that are new only what is plain is taken away."""
        for m, held, contents in self._held:
            for name in [name for name, _ in _plain(m) if name not in held]:
                del vars(m)[name]
            for name, value in held.items():
                vars(m)[name] = _refilled(value, contents[name]) if name in contents else value


@functools.lru_cache(maxsize=1000)
def _public_of(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if not name.startswith("_"))


def _public(module: nn.Module) -> dict[str, Any]:
    every = vars(module)
    return {name: every[name] for name in _public_of(tuple(every))}


class Attempt:
    """What a training step began with that breaks off, so that it can be run once more.

    Args:
        tree: The user's module.
        draws_elsewhere: Whether training steps were seen to draw by Python or NumPy, whose states take long to read.
    """

    def __init__(self, tree: Tree, draws_elsewhere: bool = True) -> None:
        tree.look()
        self._tree, self._attributes, self._versions = tree, Attributes(tree.others), _versions(tree)
        self._random = RandomState.of_all() if draws_elsewhere else RandomState.now()

    def undo(self) -> None:
        """Put back attributes and random numbers.

        What only a new branch draws by Python or NumPy, it will draw anew: it is no other draw than the first.

        Raises:
            UnsupportedModelError: If more was written, which would be written twice.
        """
        self._random.restore()
        self._attributes.put_back()
        self._tree.look()
        before, now = self._versions, _versions(self._tree)
        if not same(before[0], now[0]) or before[1] != now[1]:
            raise UnsupportedModelError(
                "a training step took a branch that no step before it took, after it had written into buffers, "
                "parameters or metrics, so that it cannot be run again. Let every branch run in the first training "
                "step of the fit, or write these at the end of the step."
            )


def _versions(tree: Tree) -> tuple[list[Tensor], list[int]]:
    """Return what a training step may write, and numbers that tell whether it was written."""
    tensors = [*tree.parameters, *tree.buffers()]
    return tensors, [t._version for t in tensors] + [m._update_count for m in tree.metrics]


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in _public(module).items() if type(value) in _PLAIN)


def _refilled(value: Any, contents: Any) -> Any:
    """Return the very object that an attribute held, with what it contained."""
    if isinstance(value, list | set | dict | deque):
        value.clear()
        value.extend(contents) if isinstance(value, list | deque) else value.update(contents)
    return value


@contextmanager
def _same_metrics(module: nn.Module) -> Iterator[None]:
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    saved = [{name: copy.deepcopy(m.__dict__[name]) for name in _state_names(m)} for m in metrics]
    try:
        yield
    finally:
        for metric, before in zip(metrics, saved, strict=True):
            metric.__dict__.update(before)


def _state_names(metric: Metric) -> list[str]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    return [name for name in names if name in metric.__dict__]


@contextmanager
def _silenced(module: pl.LightningModule, name: str) -> Iterator[None]:
    module.__dict__[name] = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        del module.__dict__[name]
