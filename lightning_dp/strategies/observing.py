"""Looking at a user's training step before the first release, without a trace in its metrics, buffers or logs.

Owns: the samples that are looked at. Does not own: how a step is tried (``trials``), what is put back
(``undisturbed``) or what is looked for (``bookkeeping``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from lightning_dp.bookkeeping import BookKeeping, Keeping, Subject, self_check
from lightning_dp.bookkeeping.interception import uncompiled
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.data import PoissonLoader
from lightning_dp.errors import UnsupportedModelError
from lightning_dp.strategies.trials import ManualTrial, Trial
from lightning_dp.strategies.undisturbed import evaluating, same_attributes, undisturbed

_LETTERS = "abcd"

_LONG = 3.0
"""Seconds of looking at a model after which it is said what is done before the first step."""

T = TypeVar("T")


class Observer:
    """Lets a book-keeping observe a training step on samples of the training data.

    Args:
        module: The user's module.
        loader: Gives the samples, through the user's own ``collate_fn``.
        trial: Runs the training step.
        mean_loss: Whether the loss is the mean over the batch, rather than the sum.
    """

    def __init__(self, module: pl.LightningModule, loader: PoissonLoader, trial: Trial, *, mean_loss: bool) -> None:
        self._module, self._loader, self._trial, self._mean_loss = module, loader, trial, mean_loss
        self._index: dict[str, int] = {}
        self._written: set[str] = set()
        self.draws_elsewhere = False
        self.num_checked = 0

    def rehearse(self, trial: ManualTrial) -> tuple[list[Optimizer], set[Optimizer]]:
        """Find out which optimizers step, and which of them do so by gradients that do not depend on the samples."""
        self._choose_samples()
        with undisturbed(self._module):
            trial.seek(self.batch("aaa"))
        runs = []
        alike, unlike = [letter * 3 for letter in self._index], [_LETTERS[:3]] if len(self._index) > 1 else []
        for samples in alike + unlike:
            with undisturbed(self._module):  # each run, so that all draw the same random numbers
                runs.append(trial.steps(self.batch(samples), self.batch(samples)))
        return trial.compared(runs)

    def observe(self, keeping: Keeping, trained: dict[str, nn.Parameter], *, check: bool) -> None:
        """Observe, and check the bound on the user's own model, data and loss.

        Raises:
            UnsupportedModelError: If the model cannot be observed or a property of the check does not hold.
        """
        if not isinstance(keeping, BookKeeping):
            self._initialize()
            return  # a sample that is alone in its batch depends on no other
        with uncompiled():  # also where autograd is compared: compiled code may draw other random numbers
            self._observe(keeping, trained, check)

    def after_each(self, run: Callable[[], T]) -> list[T]:
        """Return what runs after a training step on the first sample, on the first again, and on each other one.

        All begin with the same random numbers.
        """
        if not self._index:
            self._choose_samples()
        found = []
        for sample in ("a", *self._index):
            with undisturbed(self._module):
                state = RandomState.of_all()
                self._trial.loss(self.batch(sample))
                state.restore()
                found.append(run())
        return found

    def norms(self, keeping: Keeping, sample: str) -> list[dict[str, float]]:
        """Return the norm of each parameter's gradient, in every release, of a batch of one of the chosen samples."""
        if not self._index:
            self._choose_samples()
        samples = sample * (2 if any(map(_needs_two, self._module.modules())) else 1)
        with uncompiled(), undisturbed(self._module):
            every = cast(BookKeeping, keeping)  # trials of automatic optimization take the loop as well
            books = self._alike(lambda: self._trial.books(every, self.batch(samples), len(samples)))
            return [{k: float(part[0].sqrt()) for k, part in book.norm_sq_by_parameter().items()} for book in books]

    @property
    def num_samples(self) -> int:
        """How many samples were chosen to be looked at; 0 before."""
        return len(self._index)

    def look(self, keeping: BookKeeping) -> None:
        """Let a book-keeping observe, and check nothing."""
        if not self._index:
            self._choose_samples()
        rows = self._loader.units.examples_per_unit
        varied = len(self._index) > 1
        keeping.observe(self._loss, varied=varied, rows=rows, draws_elsewhere=self.draws_elsewhere)

    def _observe(self, keeping: BookKeeping, trained: dict[str, nn.Parameter], check: bool) -> None:
        start = time.monotonic()
        self.look(keeping)
        checked = check and len(self._index) > 1
        if checked and time.monotonic() - start > _LONG:
            rank_zero_info(
                "Privacy: the bound on one example is checked on the model before the first step. That takes about as "
                "long as training on 50 examples."
            )
        if not checked or keeping.in_parts:
            self._check_not_written()
        if not checked:
            return
        named = {**dict(self._module.named_buffers()), **dict(self._module.named_parameters())}
        held = [name for name, _ in self._module.named_buffers()]
        subject = Subject(
            state={name: named[name] for name in (*held, *self._written)},
            batch=self.batch,
            books=lambda batch, num_samples: self._alike(lambda: self._trial.books(keeping, batch, num_samples)),
            gradients=lambda batch: self._alike(lambda: self._trial.gradients(trained, batch)),
            evaluating=lambda: evaluating(self._module),
            mean_loss=self._mean_loss,
            others="".join(self._index)[:0:-1],
            smallest="aa" if any(map(_needs_two, self._module.modules())) else "a",
            coarse=keeping.coarse or str(self._module.trainer.precision).startswith("bf16"),
            hold=keeping.hold,
            add_up=keeping.add_up,
        )
        with undisturbed(self._module):
            self_check(subject)
        self.num_checked = len(self._index)

    def _check_not_written(self) -> None:
        for name in self._written:
            raise UnsupportedModelError(
                f"the training step writes into the parameter '{name}': what it writes is not noised, and without the "
                "self-check, or where it is sharded, it is not known whether it depends on the samples. Let only the "
                "optimizer change parameters while training; an average of weights belongs in on_train_batch_end."
            )

    def _choose_samples(self) -> None:
        """Choose up to four samples, evenly spread over the dataset and of different sizes, whose loss is finite."""
        self._initialize()
        size, wanted = self._loader.units.num_units, len(_LETTERS)
        count = min(4 * wanted, size)
        spread = [k * size // count for k in range(count)]
        found: list[int] = []
        for index in self._varied([i for start in range(wanted) for i in spread[start::wanted]]):
            self._index = {"a": index}
            with undisturbed(self._module) as written:
                batch, before = self.batch("aa"), RandomState.of_all()
                loss = self._trial.loss(batch)
                self.draws_elsewhere |= before.differs_elsewhere_from(RandomState.of_all())
            self._written |= written.names
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
        self._check_order()

    def _initialize(self) -> None:
        """Let lazy modules initialise their parameters, which depends on shapes alone."""
        if any(is_lazy(p) for p in self._module.parameters()):
            with uncompiled(), undisturbed(self._module, attributes=False):  # sizes that are found are kept
                self._trial.loss(self._loader.batch_of([0, 0]))

    def _check_order(self) -> None:
        """Raise if batches are put into an order of their own: then no row of a batch is known to be a sample's."""
        with undisturbed(self._module):
            one, other, first, second = (_tensors(self.batch(samples)) for samples in ("ab", "ba", "aa", "bb"))
        if _all_equal(one, other) and not _all_equal(first, second):
            raise UnsupportedModelError(
                "the collate_fn of the train dataloader orders the samples of a batch by itself, such as by length: "
                "which row belongs to which sample is then not known. Keep the order that it is given; for packed "
                "sequences use pack_padded_sequence(..., enforce_sorted=False)."
            )

    def _varied(self, indices: list[int]) -> list[int]:
        """Return the samples in an order in which sizes alternate: samples of one length hide what depends on it."""
        by_size: dict[Any, list[int]] = {}
        with undisturbed(self._module):
            for index in indices:
                by_size.setdefault(_size(self._loader.batch_of([index])), []).append(index)
        return [index for few in zip_longest(*by_size.values()) for index in few if index is not None]

    def _loss(self, samples: str) -> Tensor | None:
        with undisturbed(self._module) as written:  # each pass, so that all begin with the same buffers
            loss = self._trial.loss(self.batch(samples))
        self._written |= written.names
        return loss

    def _alike(self, run: Callable[[], T]) -> T:
        """Run a pass that begins with the same attributes as the one before."""
        with same_attributes(self._module):
            return run()

    def batch(self, samples: str) -> Any:
        """Return a batch of the chosen samples that a string names: ``"aab"`` is ``[a, a, b]``."""
        only = self._index["a"]  # a dataset of one sample has no b
        first = [only, self._index.get("b", only)]
        return self._loader.batch_of([self._index.get(s, only) for s in samples], first)


def _tensors(batch: Any) -> list[Tensor]:
    return [t for t in tree_flatten(batch)[0] if isinstance(t, Tensor)]


def _all_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _needs_two(layer: nn.Module) -> bool:
    """Whether a layer cannot run on one sample; where it is private it has been refused before."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training


def _size(batch: Any) -> tuple[Any, ...]:
    """Return what tells samples of different length apart, padded (the last value is repeated) or not."""
    tensors = [t for t in _tensors(batch) if t.numel()]
    return tuple((tuple(t.shape), int((t == t.flatten()[-1]).sum())) for t in tensors)
