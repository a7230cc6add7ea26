"""Finding out which tensor axes carry the samples: by observation, never by guessing from sizes.

Owns: the observing passes and what their contents tell. Does not own: where samples come from, or what is recorded.

A ``[T, T]`` table indexed by position is no sample axis, even on the day T equals the batch size. Two things tell:

- *shapes*: one forward pass with two samples and one with three; what changed carries the batch;
- *contents*: two forward passes with three samples that differ in the first one; what changed belongs to that sample.
  This finds the order of merged (position, sample) axes, and refuses samples that influence each other. Where all rows
  are alike, as those of a class token repeated for every frame of a video, their gradients tell.

The batches are made of two samples ``a`` and ``b`` of the user's own dataset: ``[a, b]`` against ``[a, a, b]``, and
``[a, a, b]`` against ``[b, a, b]``. A collate function that pads to the longest sample gives them all one length.

What a pass changes besides, such as buffers, is the caller's to restore between the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.bookkeeping import ordering
from lightning_dp.bookkeeping.axes import SampleAxis
from lightning_dp.bookkeeping.interception import Handler, without_interception
from lightning_dp.bookkeeping.layout import Kind, Layout, Layouts
from lightning_dp.bookkeeping.packing import Packing
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.bookkeeping.source import check_opaque
from lightning_dp.bookkeeping.tracing import DifferentControlFlow, Event, Tracer, Use
from lightning_dp.bookkeeping.witness import ROUNDS, Witness, routing
from lightning_dp.errors import UnsupportedModelError

Swap = Callable[[Handler], AbstractContextManager[None]]
"""Context in which the functions that a trained parameter enters go to a handler."""

Forward = Callable[[str], Any]
"""Runs the training step's forward pass on the samples named by a string (``"aab"`` is ``[a, a, b]``) for its loss."""

Moved = tuple[Tensor, Tensor]
"""The rows of a gradient that changed with sample 0, and those that did not and are not zero."""

_QUIET_ROUNDS = 3
"""How many rounds must show no new function before no more are expected."""

_SEARCHING_ROUNDS = 12
"""The same while a trained parameter was not seen at all: it may be in a layer that is dropped at random."""

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
"""Relative change of a row's contents that may be rounding: equal shapes run equal kernels, so it is hardly any."""

_COUPLED = (
    "a sample changes what the function computes for another sample of the batch, so no sample has a gradient of its "
    "own. Batch normalisation and any other statistic over the batch do this: use group or layer normalisation. "
    "So does sorting the samples of a batch by their length: leave that to pack_padded_sequence(enforce_sorted=False)."
)
_UNKNOWN_ORDER = (
    "an axis holds several rows of every sample, and which rows belong to which sample cannot be told, because the "
    "first two samples do not differ there. Keep an axis of the samples alone where this parameter is used."
)

_DEPENDS_ON_BATCH = (
    "the training step ran other functions for two samples than for three, or for other samples ({}): its control flow "
    "depends on the batch, so the axes that carry the samples cannot be observed. Compute all samples of a batch at "
    "once, or train without the book, one sample at a time: DPStrategy(clipping_engine='loop')."
)


@dataclass(frozen=True)
class _Pass:
    """What one pass showed.

    Args:
        events: Its events.
        uses: Its uses of parameters.
        witness: What was seen of all operators.
        gradients: What tells whether gradients changed, for the outputs of the uses that were asked for.
    """

    events: list[Event]
    uses: list[Use]
    witness: Witness
    gradients: dict[int, list[Digest | None]] = field(default_factory=dict)

    @property
    def random(self) -> bool:
        """Whether the pass drew random numbers."""
        return self.witness.num_draws > 0


@dataclass(frozen=True)
class Digest:
    """One number for each row of a tensor along its sample axis (or one for all), and the size that it could have."""

    value: Tensor
    scale: Tensor
    tolerance: float


def observe(names: Mapping[int, str], swap: Swap, forward: Forward, varied: bool = True) -> Layouts:
    """Observe a model.

    Args:
        names: Name of each trained parameter by ``id``.
        swap: Swaps the classes of the parameters around a pass.
        forward: Runs the forward pass.
        varied: Whether there are two different samples whose contents can be compared.

    Returns:
        The layouts of all functions that a trained parameter entered.

    Raises:
        UnsupportedModelError: If the functions that run differ from pass to pass.
    """
    original = RandomState.of_all()
    layouts, quiet_rounds, failures = Layouts(), 0, 0
    try:
        for seed in range(ROUNDS):
            try:
                found, random = _observe(names, swap, forward, varied, original, seed)
            except DifferentControlFlow as event:  # a first pass may fill a cache; what goes on depends on the batch
                failures += 1
                if failures == _QUIET_ROUNDS:
                    raise UnsupportedModelError(_DEPENDS_ON_BATCH.format(event)) from None
                continue
            quiet_rounds = 0 if add(layouts, found) else quiet_rounds + 1
            expected = _QUIET_ROUNDS if set(names.values()) <= layouts.names else _SEARCHING_ROUNDS
            if not random or quiet_rounds == expected:
                break
    finally:
        original.restore()
    return layouts


def add(layouts: Layouts, found: Layouts) -> bool:
    """Add what another round saw; return whether there was anything new. A round that finds coupling decides."""
    return layouts.extend(found, _COUPLED)


def _observe(
    names: Mapping[int, str], swap: Swap, forward: Forward, varied: bool, state: RandomState, seed: int
) -> tuple[Layouts, bool]:
    """Return the layouts of one round, and whether anything was random in it."""
    two = _trace(names, None, swap, forward, "ab", state, seed)
    three = _trace(names, two.events, swap, forward, "aab", state, seed)
    other = _trace(names, two.events, swap, forward, "bab" if varied else "aab", state, seed)
    _check_same_uses(three, other)
    gradients: list[tuple[Moved | None, ...]] = [()] * len(three.uses)
    vague = [k for k, pair in enumerate(zip(three.uses, other.uses, strict=True)) if refined(*pair)[1]]
    if vague and varied:
        passes = [_trace(names, two.events, swap, forward, s, state, seed, vague).gradients for s in ("aab", "bab")]
        for k in passes[0].keys() & passes[1].keys():
            gradients[k] = tuple(map(_moved, passes[0][k], passes[1][k]))
    found = [refined(*each)[0] for each in zip(three.uses, other.uses, gradients, strict=True)]
    if varied and any(layout.reason == _UNKNOWN_ORDER for layout in found):
        # Row 0 is the first sample's in every order, and may be its only one that differs; row 1 is never the second's
        # of a block: real samples that are followed by made ones.
        third = _trace(names, two.events, swap, forward, "abb", state, seed)
        _check_same_uses(three, third)
        found = [refined(*each)[0] for each in zip(three.uses, other.uses, gradients, third.uses, strict=True)]
    layouts = Layouts()
    for use, layout in zip(three.uses, found, strict=True):
        reason = routing(layout, two.witness, three.witness)
        if reason:
            layout = replace(layout, kind=Kind.REFUSED, reason=reason)
        layouts.add(use.key, layout, use.with_gradient)
    return layouts, three.random


def _paired(one: _Pass, other: _Pass) -> list[tuple[Use, Use]]:
    if [use.key for use in one.uses] != [use.key for use in other.uses]:
        raise DifferentControlFlow
    return list(zip(one.uses, other.uses, strict=True))


def _check_same_uses(one: _Pass, other: _Pass) -> None:
    if [use.key for use in one.uses] != [use.key for use in other.uses]:
        raise DifferentControlFlow("the same functions used other parameters")


def _trace(
    names: Mapping[int, str],
    before: list[Event] | None,
    swap: Swap,
    forward: Forward,
    samples: str,
    state: RandomState,
    seed: int,
    vague: Collection[int] = (),
) -> _Pass:
    state.restore()
    tracer, witness = Tracer(names, before, digest, vague), Witness(seed, len(samples))
    try:
        with swap(tracer.dispatch), witness:
            loss = forward(samples)
        if before is not None:  # only then is it known what every function was used for
            with without_interception():
                check_opaque(loss, names, tracer.seen, tracer.registered, lambda: forward(samples))
    finally:
        tracer.release()
    tracer.check_complete()
    return _Pass(tracer.events, tracer.uses, witness, _gradients(loss, tracer) if vague else {})


def _gradients(loss: Any, tracer: Tracer) -> dict[int, list[Digest | None]]:
    """Return what tells whether gradients of outputs changed, for the uses that were kept."""
    outputs = [t for kept in tracer.kept.values() for t in kept if t.requires_grad]
    if not isinstance(loss, Tensor) or not loss.requires_grad or not outputs:
        return {}
    try:
        found = torch.autograd.grad(loss, outputs, allow_unused=True)
    except RuntimeError:  # reentrant checkpoints allow no such gradients
        return {}
    by_id = {id(t): g for t, g in zip(outputs, found, strict=True)}
    return {
        k: [digest(by_id.get(id(t)), axis) for t, axis in zip(kept, tracer.uses[k].layout.outputs, strict=True)]
        for k, kept in tracer.kept.items()
        if len(kept) == len(tracer.uses[k].layout.outputs)
    }


def digest(leaf: Any, axis: SampleAxis | None) -> Digest | None:
    """Return what tells whether the contents of a leaf changed, and in which rows along the sample axis."""
    if isinstance(leaf, bool | int | float):
        leaf = torch.tensor([leaf], dtype=torch.float64)
    if isinstance(leaf, slice):
        leaf = torch.tensor([n for n in (leaf.start, leaf.stop, leaf.step) if isinstance(n, int)], dtype=torch.float64)
    if not isinstance(leaf, Tensor):
        return None
    tolerance = _TOLERANCE.get(leaf.dtype.to_real() if leaf.is_complex() else leaf.dtype, 0.0)
    rows = leaf.detach() if leaf.layout is torch.strided else leaf.detach().to_dense()
    rows = rows.as_subclass(Tensor)
    rows = torch.view_as_real(rows.resolve_conj()).double() if rows.is_complex() else rows.double()
    rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis.dim, 0).reshape(rows.shape[axis.dim], -1)
    weight = torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return Digest((rows @ weight).cpu(), (rows.abs() @ weight).cpu(), tolerance)


def refined(
    use: Use, other: Use, gradients: Sequence[Moved | None] = (), third: Use | None = None
) -> tuple[Layout, bool]:
    """Refine a layout by a second pass, which differs in sample 0 of three.

    Args:
        use: The use in the first pass.
        other: The same use in the second.
        gradients: What changed of the gradient of every output; nothing before they are looked at.
        third: The same use in a third pass, which differs from the first in sample 1.

    Returns:
        The layout, and whether gradients would tell more.
    """
    layout = use.layout
    if layout.kind in (Kind.REFUSED, Kind.SHARED):
        return layout, False
    axes = (*(layout.leaves or (None,) * len(use.leaves)), *layout.outputs)
    pairs = zip((*use.leaves, *use.outputs), (*other.leaves, *other.outputs), axes, strict=True)
    if use.packing is not None and other.packing is not None:
        coupled = other.packing.problem(3) or not all(_fits_packed(use.packing, other.packing, *pair) for pair in pairs)
        return (replace(layout, kind=Kind.REFUSED, reason=_COUPLED) if coupled else layout), False
    orders = [orders_of(axis, changed(x, y), x) for x, y, axis in pairs]
    if third is not None:
        again = zip((*use.leaves, *use.outputs), (*third.leaves, *third.outputs), axes, orders, strict=True)
        orders = [fits & orders_of(axis, changed(x, y), x, 1) for x, y, axis, fits in again]
    if not all(orders):
        return replace(layout, kind=Kind.REFUSED, reason=_COUPLED), False
    vague = any(len(fits) > 1 for fits in orders)
    for k, moved in enumerate(gradients, len(orders) - len(layout.outputs)):
        axis = axes[k]
        if axis is not None and moved is not None:
            orders[k] = (orders[k] & ordering.by_gradient(axis, *moved)) or orders[k]
    settled = ordering.settle(axes, orders)
    if None in settled:
        return replace(layout, kind=Kind.REFUSED, reason=_UNKNOWN_ORDER), vague
    turned = [axis and axis.ordered(order or 1) for axis, order in zip(axes, settled, strict=True)]
    outputs = turned[len(turned) - len(layout.outputs) :]
    return replace(layout, leaves=tuple(turned[: len(layout.leaves)]), outputs=tuple(outputs)), vague


def _fits_packed(packing: Packing, other: Packing, x: Digest | None, y: Digest | None, axis: SampleAxis | None) -> bool:
    """Whether the rows of samples 1 and 2 are the same in both passes; sample 0 may have another length."""
    if axis is None or x is None or y is None:
        return bool(orders_of(None, changed(x, y), x))
    for sample in (1, 2):
        rows = [p.rows_of(sample) if axis.dim == 0 else p.places()[sample : sample + 1] for p in (packing, other)]
        mine, its = (Digest(d.value[r], d.scale[r], d.tolerance) for d, r in zip((x, y), rows, strict=True))
        moved = changed(mine, its)
        if moved is None or moved.numel():
            return False
    return True


def changed(x: Digest | None, y: Digest | None) -> Tensor | None:
    """Return which rows changed; ``None`` if the shape did."""
    if x is None or y is None:
        return ordering.no_rows() if x is y else None
    if x.value.shape != y.value.shape:
        return None
    scale = torch.maximum(x.scale, y.scale)
    different = (x.value - y.value).abs() > x.tolerance * scale
    return torch.nonzero(different | (x.value.isfinite() != y.value.isfinite())).flatten()


def _moved(x: Digest | None, y: Digest | None) -> Moved | None:
    """Return which rows of a gradient changed and which did not and are used; ``None`` if nothing changed."""
    rows = changed(x, y)
    if rows is None or x is None or not rows.numel():
        return None
    used = x.scale > x.tolerance * x.scale.max()
    used[rows] = False
    return rows, used.nonzero().flatten()


def orders_of(axis: SampleAxis | None, rows: Tensor | None, x: Digest | None, sample: int = 0) -> ordering.Orders:
    """Return the orders of an axis that fit to the rows that changed with a sample; none if other samples changed."""
    if rows is None or (axis is None and rows.numel()):
        return frozenset()
    if axis is None:
        return frozenset({1})
    if rows.numel() == 0 and x is not None:
        return ordering.of_copies(axis, x.value, x.tolerance * float(x.scale.max())) or ordering.fitting(axis, rows)
    return ordering.fitting(axis, rows, sample)
