"""The one oracle of these tests: a loop over the samples with autograd in float64, and a check against it.

A sample's gradient is that of the loss of a batch of one. Nothing here is shared with what is tested.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_dp.bookkeeping import Book, BookKeeping

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """A model, a batch with the samples in front, and the mean loss of a batch."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Loss
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    sizes: tuple[int, ...] = (4, 1)
    tolerance: float | None = None
    trained: Callable[[str], bool] = field(default=lambda name: True)
    slow: bool = False


def check(case: Case) -> None:
    """Compare the books of batches of several sizes with the oracle, and see that nothing is left on the model."""
    torch.manual_seed(0)
    model, batch = case.build().to(case.dtype).train(), to_dtype(case.batch(), case.dtype)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and case.trained(n)}
    others = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in named}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    classes = [type(p) for p in model.parameters()]
    loss_of(case, model, batch)  # some libraries note on a module that it ran once
    attributes = [set(vars(m)) for m in model.modules()]
    keeping = observed(case, model, batch, named, others)
    for size in case.sizes:
        part = select(batch, range(size))
        book = book_of(case, model, part, keeping)
        compare(case, book, *reference(case, model, part, named))
        assert all(p.grad is None for p in model.parameters()), "a parameter got a gradient"
    assert [type(p) for p in model.parameters()] == classes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "a value changed"
    assert [set(vars(m)) for m in model.modules()] == attributes
    copy.deepcopy(model)
    assert {type(p) for p in pickle.loads(pickle.dumps(list(model.parameters())))} <= {nn.Parameter}


def observed(
    case: Case, model: nn.Module, batch: Batch, named: dict[str, nn.Parameter], others: dict[str, nn.Parameter]
) -> BookKeeping:
    """Return the book-keeping of a model observed on the first two samples of a batch."""
    keeping = BookKeeping(named, others)
    keeping.observe(lambda samples: loss_of(case, model, select(batch, ["ab".index(s) for s in samples])))
    return keeping


def book_of(case: Case, model: nn.Module, batch: Batch, keeping: BookKeeping) -> Book:
    """Return the book of one forward and backward pass over a batch."""
    with keeping.recording(size_of(batch)):
        loss = loss_of(case, model, batch)
    with keeping.recording():
        loss.backward()
    return keeping.close()


def loss_of(case: Case, model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss; every call draws the same random numbers and finds the same buffers."""
    torch.manual_seed(1)
    with same_buffers(model), torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        return case.loss(model, batch)


def reference(
    case: Case, model: nn.Module, batch: Batch, named: dict[str, nn.Parameter]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return each sample's norm ``[B]`` and gradients ``[B, *shape]``, in float64 whatever the model is in."""
    exact = Case(case.name, case.build, case.batch, case.loss)
    if case.dtype is not torch.float64:
        model, batch = copy.deepcopy(model).double(), to_dtype(batch, torch.float64)
    parameters = dict(model.named_parameters())
    rows = []
    for i in range(size_of(batch)):
        loss = loss_of(exact, model, select(batch, [i]))
        loss.backward()  # autograd.grad is refused by reentrant checkpoints
        rows.append([torch.zeros_like(p) if p.grad is None else p.grad for p in map(parameters.__getitem__, named)])
        model.zero_grad(set_to_none=True)
    gradients = {n: torch.stack(column) for n, column in zip(named, zip(*rows, strict=True), strict=True)}
    return torch.stack([g.square().reshape(len(g), -1).sum(1) for g in gradients.values()]).sum(0).sqrt(), gradients


def compare(case: Case, book: Book, norms: Tensor, gradients: dict[str, Tensor]) -> None:
    """Assert that the norms, the clipped sum and every single clipped gradient of a book are right."""
    size, tolerance = len(norms), case.tolerance or TOLERANCE[torch.bfloat16 if case.autocast else case.dtype]
    found = book.norm_sq().detach().double().sqrt() * size
    assert found.shape == norms.shape
    assert float((found - norms).abs().max()) <= tolerance * float(norms.max()), f"norms {found} instead of {norms}"
    bound = float(norms.median())
    factor = (bound / (found + 1e-12)).clamp(max=1)
    sums = book.weighted_sums(factor * size)
    assert set(sums) <= set(gradients)
    scale = float((factor * norms).max())  # of what is added, since gradients of several samples may cancel
    for name, gradient in gradients.items():
        expected = torch.tensordot(factor, gradient, 1)
        actual = sums.get(name, torch.zeros(()).expand_as(expected)).double()
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}"
        error = float((actual - expected).norm())
        assert error <= tolerance * max(float(expected.norm()), scale), f"clipped sum of {name} off by {error}"
    for i in range(size):
        alone = torch.zeros(size, dtype=torch.float64)
        alone[i] = float(factor[i]) * size
        norm = torch.stack([t.double().norm() for t in book.weighted_sums(alone).values()]).norm()
        assert float(norm) <= bound * (1 + max(tolerance, 1e-6)), f"sample {i} adds {float(norm)}, above {bound}"


def size_of(batch: Batch) -> int:
    """Return the number of samples in a batch."""
    return next(iter(batch.values())).shape[0]


def select(batch: Batch, samples: object) -> Batch:
    """Return the named samples of a batch."""
    return {name: t[list(samples)] for name, t in batch.items()}  # type: ignore[call-overload]


def to_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return a batch with its floating-point tensors in another dtype."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}


@contextlib.contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Give the buffers back the values they had, for modules that update some in every forward pass."""
    before = [(t, t.detach().clone()) for t in model.buffers()]
    yield
    with torch.no_grad():
        for t, value in before:
            if not torch.equal(t, value):
                t.copy_(value)
