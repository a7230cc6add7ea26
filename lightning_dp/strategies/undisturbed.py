"""Contexts in which a training step can be tried without a trace in buffers, metrics, logs or random numbers.

Owns: what is put back. Does not own: what is tried.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_dp.strategies.written import Written


@contextmanager
def undisturbed(module: pl.LightningModule) -> Iterator[Written]:
    """Put back afterwards: parameters, buffers, metrics, random numbers; inside, ``log`` goes nowhere.

    Yields:
        What tells, afterwards, which parameters were written.
    """
    written = Written(dict(module.named_parameters()))
    with ExitStack() as stack:
        stack.callback(written.undo)
        stack.enter_context(_same_but_for_parameters(module))
        with written:
            yield written


@contextmanager
def undisturbed_at_full_speed(module: pl.LightningModule) -> Iterator[None]:
    """Put back the same, for measuring: every parameter is copied beforehand, so that no operator is looked at."""
    copies = [(p, p.data, p.detach().clone()) for p in module.parameters()]
    try:
        with _same_but_for_parameters(module):
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
