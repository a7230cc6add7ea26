"""Finding out which tensor axes carry the samples: by observation, never by guessing from sizes.

Owns: the observing passes. Does not own: what shapes tell (``conclusions``) and contents (``contents``), where samples
come from, or what is recorded.

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

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.bookkeeping.conclusions import Event
from lightning_dp.bookkeeping.contents import COUPLED, UNKNOWN_ORDER, Digest, Moved, digest, moved, refined
from lightning_dp.bookkeeping.interception import Handler, without_interception
from lightning_dp.bookkeeping.layout import Kind, Layouts
from lightning_dp.bookkeeping.random_state import RandomState, seed_elsewhere
from lightning_dp.bookkeeping.source import check_opaque
from lightning_dp.bookkeeping.tracing import DifferentControlFlow, Tracer, Use
from lightning_dp.bookkeeping.witness import ROUNDS, Witness, routing
from lightning_dp.errors import UnsupportedModelError

Swap = Callable[[Handler], AbstractContextManager[None]]
"""Context in which the functions that a trained parameter enters go to a handler."""

Forward = Callable[[str], Any]
"""Runs the training step's forward pass on the samples named by a string (``"aab"`` is ``[a, a, b]``) for its loss."""

_QUIET_ROUNDS = 3
"""How many rounds must show no new function before no more are expected."""

_SEARCHING_ROUNDS = 12
"""The same while a trained parameter was not seen at all: it may be in a layer that is dropped at random."""

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
        """Whether another pass may show what this one did not."""
        return self.witness.decides_at_random


def observe(
    names: Mapping[int, str], swap: Swap, forward: Forward, varied: bool = True, draws_elsewhere: bool = False
) -> Layouts:
    """Observe a model.

    Args:
        names: Name of each trained parameter by ``id``.
        swap: Swaps the classes of the parameters around a pass.
        forward: Runs the forward pass.
        varied: Whether there are two different samples whose contents can be compared.
        draws_elsewhere: Whether it draws random numbers by Python or NumPy, which no pass sees.

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
            if not (random or draws_elsewhere) or quiet_rounds == expected:
                break
    finally:
        original.restore()
    return layouts


def add(layouts: Layouts, found: Layouts) -> bool:
    """Add what another round saw; return whether there was anything new. A round that finds coupling decides."""
    return layouts.extend(found, COUPLED)


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
            gradients[k] = tuple(map(moved, passes[0][k], passes[1][k]))
    found = [refined(*each)[0] for each in zip(three.uses, other.uses, gradients, strict=True)]
    if varied and any(layout.reason == UNKNOWN_ORDER for layout in found):
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
    seed_elsewhere(seed)
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
