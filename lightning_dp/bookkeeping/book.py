"""The book of one backward pass: for every parameter the entries of its per-sample gradients.

Owns: filing, carrying entries of derived tensors back to their parameters, norms and clipped sums. Does not own: how
entries arise (``rules``) or which factor clips them (``lightning_dp.clipping``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_dp.bookkeeping.bundles import Bundle, bundles_of
from lightning_dp.bookkeeping.cancelling import found_again, gradient_of, norms_sq_of
from lightning_dp.bookkeeping.entries import Dense, Entry, Kept
from lightning_dp.bookkeeping.layout import Key
from lightning_dp.bookkeeping.pairs import FEW, added, combined
from lightning_dp.bookkeeping.precision import without_autocast
from lightning_dp.bookkeeping.products import Outer
from lightning_dp.bookkeeping.refusals import kept_from_before, overwritten

SPARE = 2**22
"""Elements that per-sample gradients may take, however small the model."""

_ANY = 2**62
"""More elements than there are."""


@dataclass(eq=False)
class Derived:
    """A function of parameters alone, such as ``W.t()``, ``W + B @ A`` or an embedding of positions.

    Args:
        value: The tensor, with its autograd graph down to ``roots``.
        roots: The leaves of the graph, by parameter name: detached copies that share the parameters' memory.
        identity: How the observation recognises it.
        source: What this is another view of, if an entry can pass to it unchanged or transposed.
        transposed: Whether it is the transpose of ``source``.
    """

    value: Tensor
    roots: dict[str, Tensor]
    identity: Key
    source: str | Derived | None = None
    transposed: bool = False
    version: int = field(init=False)
    """That of ``value`` when it was made: if it is another, the graph is now that of other values."""

    def __post_init__(self) -> None:
        self.version = self.value._version


def release(t: Tensor) -> None:
    """Make an ordinary tensor of a derived one that the model kept, which must not be differentiated any more."""
    derived: Derived = vars(t).pop("derived")
    vars(t).pop("version", None)
    t.__class__ = Tensor

    def hook(*_: Tensor) -> None:  # the graph ends in copies of the parameters, so the gradient would be lost
        raise kept_from_before(derived.identity)

    assert t.grad_fn is not None, "a function of roots"
    t.grad_fn.register_prehook(hook)


Target = str | Derived
"""Where an entry is filed: the name of a parameter, or a derived tensor."""


@dataclass
class Book:
    """Per-sample gradients of ``num_samples`` samples, of the scalar that was differentiated.

    Guarantee: the norms and the sums come from the same entries, so what is clipped is what is added. Neither is
    computed in 16 bits, whatever the model is.
    """

    num_samples: int
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    derived: list[tuple[Derived, Entry]] = field(default_factory=list)
    spare: int = SPARE
    """Elements that may still be held beyond what came back through the graph, for gradients that are materialised."""
    _bundles: list[Bundle] = field(default_factory=list)
    _alone: dict[str, dict[int, Tensor | None]] = field(default_factory=dict)
    """Samples that nearly cancel, by parameter, from `norm_sq` to `pour`, and their gradients as memory allows:
    see ``cancelling``."""

    def file(self, target: Target, entry: Entry) -> None:
        """Add an entry of a parameter or a derived tensor."""
        self._bundles, self._alone = [], {}
        while isinstance(target, Derived) and target.source is not None:
            if target.transposed:
                entry = entry.transposed() if isinstance(entry, Outer) else Dense(entry.dense().mT)
            target = target.source
        if isinstance(target, Derived):
            self.derived.append((target, entry))
        else:
            self._append(self.entries.setdefault(target, []), entry)

    def _append(self, entries: list[Entry], entry: Entry) -> None:
        """Settle an entry at once, so that what it was made of can be let go; but short products may be joined."""
        before = entries[-1] if entries else None
        if isinstance(before, Kept):  # what is added to it takes no more memory
            entry = entry if _waits(entry) else entry.settled(_ANY)
        elif not _waits(entry):
            entry = self._settled(entry)
        if isinstance(before, Kept) and isinstance(entry, Dense):
            entries[-1] = added([before, entry])
        else:
            entries.append(entry)

    def _settled(self, entry: Entry) -> Entry:
        entry = entry.settled(self.spare)
        self.spare -= entry.extra
        return entry

    def carry(self) -> None:
        """Carry the entries of derived tensors back to their parameters, and combine those of one parameter."""
        with without_autocast():
            if self.derived:
                self._carry_back()
            for name, entries in self.entries.items():
                filed = {id(e) for e in entries if not _waits(e)}
                self.entries[name] = [e if id(e) in filed else self._settled(e) for e in combined(entries)]

    def _carry_back(self) -> None:
        """Differentiate all derived tensors by one vmapped backward pass."""
        gradients: dict[Derived, Tensor] = {}
        for tensor, entry in self.derived:
            if tensor.value._version != tensor.version:
                raise overwritten(tensor.identity)
            dense = entry.dense().reshape(self.num_samples, *tensor.value.shape)
            gradients[tensor] = gradients[tensor] + dense if tensor in gradients else dense
        self.derived.clear()
        roots = {name: leaf for tensor in gradients for name, leaf in tensor.roots.items()}
        values = [tensor.value for tensor in gradients]
        upstream = [g.to(v.dtype) for v, g in zip(values, gradients.values(), strict=True)]
        for name, g in zip(roots, batched_gradients(values, list(roots.values()), upstream), strict=True):
            if g is not None:
                self.file(name, Dense(g))

    def take(self, names: Iterable[str]) -> Book:
        """Return a book of these parameters, and keep the entries of the others."""
        taken = {name: self.entries.pop(name) for name in names if name in self.entries}
        alone = {name: self._alone.pop(name) for name in taken if name in self._alone}
        return Book(self.num_samples, taken, _alone=alone)

    def norm_sq(self) -> Tensor:
        """Return the squared norm of each sample's gradient over all parameters, shape ``[B]``."""
        with without_autocast():
            bundles = self._bundled()
            inside = {name for bundle in bundles for name in bundle.members}
            parts = list(self._norms_sq([name for name in self.entries if name not in inside]).values())
            parts += [bundle.norm_sq() for bundle in bundles]
        if not parts:
            return torch.zeros(self.num_samples)
        return torch.stack([part.to(parts[0]) for part in parts]).sum(0)

    def _bundled(self) -> list[Bundle]:
        """Return the bundles that the entries make, the same ones for norms and sums."""
        if not self._bundles or not all(bundle.is_in(self.entries) for bundle in self._bundles):
            self._bundles = list(bundles_of(self.entries))
        return self._bundles

    def norm_sq_by_parameter(self) -> dict[str, Tensor]:
        """Return the squared norm of each sample's gradient of every parameter that was used, each ``[B]``."""
        with without_autocast():
            return self._norms_sq(list(self.entries))

    def _norms_sq(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the squared norms of parameters, and note the gradients of samples that nearly cancel."""
        norms, masks = {}, {}
        for name in names:
            norms[name], mask = norms_sq_of(self.entries[name])
            if mask is not None:
                masks[name] = mask
        for name, i in _marked(masks):
            norms[name][i], gradient = found_again(self.entries[name], i)
            if gradient is not None:
                fits = gradient.numel() <= self.spare
                self.spare -= gradient.numel() if fits else 0
                self._alone.setdefault(name, {})[i] = gradient if fits else None
        return norms

    def weighted_sums(
        self,
        weight: Tensor,
        hold: Callable[[str, Tensor], Tensor] | None = None,
        names: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``sum_i weight[i] * G_i`` per parameter; a sample of weight 0 adds exact zeros, even if it is NaN.

        Args:
            weight: Of every sample.
            hold: Returns what is to be kept of the sum of a parameter, by its name.
            names: Of which parameters, if not of all.
        """
        sums: dict[str, Tensor] = {}
        book = Book(self.num_samples, dict(self.entries), _alone=dict(self._alone))
        for name in self.entries if names is None else names:
            book.pour(weight, sums, [name])
            sums[name] = sums[name] if hold is None else hold(name, sums[name])
        return sums

    def pour(self, weight: Tensor, sums: dict[str, Tensor], names: Iterable[str] | None = None) -> None:
        """Add what `weighted_sums` returns to ``sums``, in place, and let every entry go that was added.

        Args:
            weight: Of every sample.
            sums: By parameter.
            names: Of which parameters, if not of all.
        """
        keep = weight != 0
        drop = not bool(keep.all())
        with without_autocast():
            for bundle in self._bundled() if names is None else ():
                bundle.pour(weight, keep if drop else None, sums)
                for name in bundle.members:
                    del self.entries[name]
            self._bundles = []
            for name in list(reversed(self.entries) if names is None else names):
                alone = self._alone.pop(name, {})
                together = keep.index_fill(0, torch.tensor(list(alone), device=keep.device), False) if alone else keep
                entries = self.entries.pop(name, [])
                for entry in entries:
                    part = entry.where(together) if drop or alone else entry
                    sums[name] = part.weighted_sum(weight, sums.get(name))
                for i, held in alone.items():
                    if keep[i]:
                        gradient = gradient_of(entries, i) if held is None else held
                        sums[name].add_(gradient.to(sums[name]) * weight[i].to(sums[name]))


def _waits(entry: Entry) -> bool:
    """Whether an entry may be joined with others of its parameter before it is settled."""
    return isinstance(entry, Outer) and entry.num_positions <= FEW


def _marked(masks: dict[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Yield the parameters and samples that are marked, by one wait for the device."""
    names, every = list(masks), list(masks.values())
    if every:
        for k, i in torch.stack([mask.to(every[0].device) for mask in every]).nonzero().tolist():
            yield names[k], i


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Let vmap run functions that have no batching rule sample by sample without a warning: it is exact."""
    set_warning = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    set_warning(False)
    try:
        yield
    finally:
        set_warning(True)


def batched_gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of ``inputs`` for a batch of output gradients ``upstream``, each ``[B, *output.shape]``."""
    with torch.enable_grad(), quiet_vmap():
        try:
            return list(
                torch.autograd.grad(
                    outputs, inputs, upstream, is_grads_batched=True, allow_unused=True, retain_graph=True
                )
            )
        except RuntimeError:  # an operator without a batching rule: one backward pass per sample
            rows = [
                torch.autograd.grad(outputs, inputs, [u[i] for u in upstream], allow_unused=True, retain_graph=True)
                for i in range(upstream[0].shape[0])
            ]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
