"""Contexts in which a training step can be tried without a trace in buffers, metrics, logs or random numbers.

Owns: what is put back. Does not own: what is tried.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

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
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


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
    before = [(m, {name: (value, copy.copy(value)) for name, value in _plain(m)}) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes in before:
            for name in [name for name, _ in _plain(m) if name not in attributes]:
                del vars(m)[name]
            for name, (value, contents) in attributes.items():
                vars(m)[name] = _refilled(value, contents)


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    if not isinstance(module, Metric):
        yield from ((n, v) for n, v in vars(module).items() if not n.startswith("_") and type(v) in _PLAIN)


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
