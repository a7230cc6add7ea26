"""Contexts in which a training step can be tried without a trace in buffers, metrics, logs or random numbers.

Owns: what is put back. Does not own: what is tried.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.errors import UnsupportedModelError
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
    written = Written(dict(module.named_parameters()))
    with ExitStack() as stack:
        stack.callback(written.undo)
        stack.enter_context(_same_but_for_parameters(module))
        if attributes:
            stack.enter_context(same_attributes(module))
        with written:
            yield written


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
        stack.enter_context(_same_random_numbers())
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
def _same_random_numbers() -> Iterator[None]:
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


_PLAIN = (bool, int, float, str, type(None), list, dict, set, deque)


@contextmanager
def same_attributes(module: nn.Module) -> Iterator[None]:
    """Put back numbers, flags and containers that modules keep as public attributes: counters, buffers of replay."""
    attributes = Attributes(module)
    try:
        yield
    finally:
        attributes.put_back()


class Attributes:
    """The public attributes of all modules as they are now, with the contents of those that are plain containers."""

    def __init__(self, module: nn.Module) -> None:
        self._held = [
            (m, _public(m), {name: copy.copy(value) for name, value in _plain(m)})
            for m in module.modules()
            if not isinstance(m, Metric)
        ]

    def put_back(self) -> None:
        """Give every module its attributes back; of those that are new only what is plain is taken away."""
        for m, held, contents in self._held:
            for name in [name for name, _ in _plain(m) if name not in held]:
                del vars(m)[name]
            for name, value in held.items():
                vars(m)[name] = _refilled(value, contents[name]) if name in contents else value


def _public(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


class Attempt:
    """What a training step began with that breaks off, so that it can be run once more.

    Args:
        module: The user's module.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module, self._attributes, self._versions = module, Attributes(module), _versions(module)
        self._random = RandomState.of_all()

    def undo(self) -> None:
        """Put back attributes and random numbers.

        Raises:
            UnsupportedModelError: If more was written, which would be written twice.
        """
        self._random.restore()
        self._attributes.put_back()
        if _versions(self._module) != self._versions:
            raise UnsupportedModelError(
                "a training step took a branch that no step before it took, after it had written into buffers, "
                "parameters or metrics, so that it cannot be run again. Let every branch run in the first training "
                "step of the fit, or write these at the end of the step."
            )


def _versions(module: nn.Module) -> list[Any]:
    tensors = [*module.parameters(), *module.buffers()]
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    return [(id(t), t._version) for t in tensors] + [m._update_count for m in metrics]


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
