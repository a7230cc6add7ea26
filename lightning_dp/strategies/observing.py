"""Looking at a user's training step before the first release, without a trace in its metrics, buffers or logs.

Owns: the batches that are looked at, and what is put back. Does not own: what is looked for (``bookkeeping``).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_dp.bookkeeping import BookKeeping, Keeping, Subject, self_check
from lightning_dp.data import PoissonLoader
from lightning_dp.errors import UnsupportedModelError
from lightning_dp.strategies.checks import check_loss

_LETTERS = "abcd"


class Observer:
    """Lets a book-keeping observe a training step on samples of the training data.

    Args:
        module: The user's module.
        loader: Gives the samples, through the user's own ``collate_fn``.
        run_step: Transfers a batch and runs the training step on it.
        mean_loss: Whether the loss is the mean over the batch, rather than the sum.
    """

    def __init__(
        self, module: pl.LightningModule, loader: PoissonLoader, run_step: Callable[[Any], Any], *, mean_loss: bool
    ) -> None:
        self._module, self._loader, self._run_step, self._mean_loss = module, loader, run_step, mean_loss
        self._index: dict[str, int] = {}

    def observe(self, keeping: Keeping, trained: dict[str, nn.Parameter], *, check: bool) -> None:
        """Observe, and check the bound on the user's own model, data and loss.

        Raises:
            UnsupportedModelError: If the model cannot be observed or a property of the check does not hold.
        """
        if not isinstance(keeping, BookKeeping):
            return  # a sample that is alone in its batch depends on no other
        before = self._parameter_values()
        self._observe(keeping, trained, check)
        for name, value in self._parameter_values().items():
            if value != before.get(name):
                raise UnsupportedModelError(
                    f"the training step writes into the parameter '{name}': what it writes is not noised. Let only the "
                    "optimizer change parameters while training; an average of weights belongs in on_train_batch_end."
                )

    @property
    def num_samples(self) -> int:
        """How many samples were chosen to be looked at; 0 before."""
        return len(self._index)

    def _parameter_values(self) -> dict[str, tuple[float, float]]:
        """Return what tells whether a parameter was written to, for every parameter."""
        values = {}
        for name, p in self._module.named_parameters():
            t = p.detach().double()
            values[name] = float(t.nan_to_num().sum()), float(t.nan_to_num().abs().sum())
        return values

    def _observe(self, keeping: BookKeeping, trained: dict[str, nn.Parameter], check: bool) -> None:
        self._choose_samples()
        keeping.observe(self._undisturbed_loss, varied=len(self._index) > 1)
        if not check or len(self._index) < 2:
            return
        subject = Subject(
            keeping=keeping,
            trained=trained,
            buffers={name: b for name, b in self._module.named_buffers() if isinstance(b, Tensor)},
            loss_of=self._loss,
            evaluating=lambda: _evaluating(self._module),
            mean_loss=self._mean_loss,
            others="".join(self._index)[:0:-1],
            coarse=str(self._module.trainer.precision).startswith("bf16"),
        )
        with undisturbed(self._module):
            self_check(subject)

    def _choose_samples(self) -> None:
        """Choose up to four samples, evenly spread over the dataset, whose loss is finite."""
        size, wanted = self._loader.num_examples, len(_LETTERS)
        count = min(4 * wanted, size)
        spread = [k * size // count for k in range(count)]
        found: list[int] = []
        for index in (i for start in range(wanted) for i in spread[start::wanted]):
            self._index = {"a": index}
            with torch.no_grad(), undisturbed(self._module):
                output = self._output("aa")
            check_loss(output)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is None or bool(loss.isfinite()):
                found.append(index)
            if len(found) == wanted:
                break
        if not found:
            raise UnsupportedModelError(
                f"the loss is not finite for any of {count} samples of the training data: look for infinite or missing "
                "values in them, or in the model's parameters."
            )
        self._index = dict(zip(_LETTERS, found, strict=False))

    def _undisturbed_loss(self, samples: str) -> Any:
        with undisturbed(self._module):  # each pass, so that all begin with the same buffers
            output = self._output(samples)
            check_loss(output)
        return output.get("loss") if isinstance(output, Mapping) else output

    def _loss(self, samples: str) -> Tensor:
        output = self._output(samples)
        check_loss(output)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise UnsupportedModelError(
                "the training step returned no loss for the first samples, so the bound cannot be checked on it. "
                "Return a loss for every batch, or train without the check: DPStrategy(self_check=False)."
            )
        return loss

    def _output(self, samples: str) -> Any:
        only = self._index["a"]  # a dataset of one sample has no b
        return self._run_step(self._loader.batch_of([self._index.get(s, only) for s in samples]))


@contextmanager
def undisturbed(module: pl.LightningModule) -> Iterator[None]:
    """Put back afterwards: buffers, metrics, random number generators; inside, ``log`` goes nowhere."""
    with ExitStack() as stack:
        stack.enter_context(_same_random_numbers())
        stack.enter_context(_same_buffers(module))
        stack.enter_context(_same_metrics(module))
        for name in ("log", "log_dict"):
            stack.enter_context(_silenced(module, name))
        yield


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
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
