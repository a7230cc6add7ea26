"""The rule for every function without one of its own: exact for any differentiable function.

Two ways, both a vector-Jacobian product of the one function with the output gradient of one sample at a time:

- *sliced*: the function runs on the rows of one sample, vmapped over the samples. Needs a function that draws nothing
  at random and none of whose arguments counts samples or holds indices, which may point to rows of the whole batch.
- *masked*: the function runs once more on the whole batch, and its graph is traversed with the output gradient of each
  sample in turn, the others set to zero. Needs nothing; B times the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_dp.bookkeeping.axes import SampleAxis
from lightning_dp.bookkeeping.book import batched_gradients, quiet_vmap
from lightning_dp.bookkeeping.entries import Dense
from lightning_dp.bookkeeping.functions import float_outputs
from lightning_dp.bookkeeping.layout import Kind
from lightning_dp.bookkeeping.operation import File, Operation, Recording
from lightning_dp.bookkeeping.precision import autocast_now
from lightning_dp.bookkeeping.random_state import replaying
from lightning_dp.errors import UnsupportedModelError

Outputs = tuple[Tensor, ...]

SLICED, MASKED = "generic: sliced", "generic: one sample at a time (slow)"
"""The two ways, as they are shown."""


def generic(operation: Operation) -> Recording:
    """File the per-sample gradients of every trained argument of any function."""
    replay, operation_name = Replay(operation), getattr(operation.func, "__name__", "function")
    layout, num_samples = operation.layout, operation.book.num_samples
    axes = [layout.leaves[k] if layout.leaves else None for k in replay.tensors_at]
    sliceable = layout.sliceable and layout.kind is Kind.PER_SAMPLE and None not in layout.outputs
    sliceable = sliceable and not layout.random and not any(map(_is_index, replay.saved, axes))
    sliceable = sliceable and all(t.layout is torch.strided for t in replay.saved)
    shared = layout.kind is Kind.SHARED

    def record(*tensors: Tensor) -> None:
        count = len(tensors) - len(axes)
        gradients, saved = tensors[:count], tensors[count:]
        rows: Sequence[Tensor | None] | None = None
        method = SLICED
        if sliceable:
            rows = _sliced(replay, saved, axes, gradients, layout.outputs, num_samples)
        if rows is None:
            method = MASKED
            rows = _masked(replay, saved, gradients, layout.outputs, num_samples)
            if not shared:
                _check_unshared(operation_name, gradients, layout.outputs)
                rows = _isolated(rows, replay, saved, axes, gradients, layout.outputs)
        for file, g in zip(replay.files, rows, strict=True):
            if g is not None:
                file(Dense(g, method))

    return record, replay.saved


class Replay:
    """A function to be run again with other tensors in the place of its own.

    Args:
        operation: The call to repeat.
    """

    def __init__(self, operation: Operation) -> None:
        leaves, self._spec = tree_flatten((operation.args, operation.kwargs))
        self._func = operation.func
        self._autocast, self._random_state = autocast_now(), operation.random_state
        filings = [operation.filing(leaf) for leaf in leaves]
        self._trained_at = [k for k, file in enumerate(filings) if file is not None]
        self.files: list[File] = [file for file in filings if file is not None]
        self.tensors_at = [k for k, t in enumerate(leaves) if isinstance(t, Tensor) and filings[k] is None]
        self.saved: list[Tensor] = [leaves[k] for k in self.tensors_at]
        self.trained: list[Tensor] = [operation.plain(leaves[k]) for k in self._trained_at]
        held = {*self.tensors_at, *self._trained_at}
        self._constants = [None if k in held else leaf for k, leaf in enumerate(leaves)]

    def __call__(self, trained: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> Outputs:
        """Run the function once more."""
        leaves = list(self._constants)
        for at, value in zip((*self._trained_at, *self.tensors_at), (*trained, *others), strict=True):
            leaves[at] = value
        args, kwargs = tree_unflatten(leaves, self._spec)
        with ExitStack() as stack:
            stack.enter_context(replaying(self._random_state))
            for context in self._autocast():
                stack.enter_context(context)
            return float_outputs(self._func(*args, **kwargs))


def _sliced(
    replay: Replay,
    saved: tuple[Tensor, ...],
    axes: list[SampleAxis | None],
    gradients: tuple[Tensor, ...],
    output_axes: tuple[SampleAxis | None, ...],
    num_samples: int,
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients by the rows of one sample at a time; ``None`` if the function does not run on them."""

    def one(slices: list[Tensor], g: list[Tensor]) -> tuple[Tensor, ...]:
        rest = iter(slices)
        others = tuple(t if axis is None else next(rest) for t, axis in zip(saved, axes, strict=True))
        outputs, pull = vjp(lambda *trained: replay(trained, others), *replay.trained)[:2]
        return tuple(pull(tuple(gi.to(o.dtype) for gi, o in zip(g, outputs, strict=True))))

    slices = [axis.split(t, num_samples) for t, axis in zip(saved, axes, strict=True) if axis is not None]
    upstream = [axis.split(g, num_samples) for g, axis in zip(gradients, output_axes, strict=True) if axis is not None]
    try:
        with quiet_vmap():
            result: tuple[Tensor, ...] = vmap(one)(slices, upstream)
    except (RuntimeError, IndexError, ValueError):  # no batching rule, or sizes that only fit the whole batch
        return None
    return result


def _is_index(t: Tensor, axis: SampleAxis | None) -> bool:
    """Whether a tensor that carries samples may hold positions along the sample axis of another."""
    return axis is not None and not (_is_real_or_complex(t) or t.dtype is torch.bool)


def _is_real_or_complex(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _check_unshared(name: str, gradients: tuple[Tensor, ...], axes: tuple[SampleAxis | None, ...]) -> None:
    """Raise if a gradient came back to an output that carries no samples, beside others that do."""
    for k, g in enumerate(gradients):
        if _axis(axes, k) is None and bool((g != 0).any()):
            raise UnsupportedModelError(
                f"output {k} of '{name}' of a trained parameter carries no samples while others do, so its gradient "
                "cannot be told apart by sample: compute this output by a function of its own."
            )


def _masked(
    replay: Replay,
    saved: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    output_axes: tuple[SampleAxis | None, ...],
    num_samples: int,
    at: int | None = None,
) -> list[Tensor | None]:
    """Return the gradients of all samples, or of the one at a place alone (``[1, *parameter.shape]``)."""
    trained = tuple(t.detach().requires_grad_() for t in replay.trained)
    with torch.enable_grad():
        outputs = replay(trained, tuple(t.detach() for t in saved))
    used = [k for k, t in enumerate(outputs) if t.requires_grad]
    if not used:  # not differentiable
        return [None] * len(trained)
    upstream = [_one_at_a_time(gradients[k], _axis(output_axes, k), num_samples) for k in used]
    if at is not None:
        upstream = [g[at : at + 1] for g in upstream]
    return batched_gradients([outputs[k] for k in used], trained, upstream)


def _isolated(
    rows: list[Tensor | None],
    replay: Replay,
    saved: tuple[Tensor, ...],
    axes: list[SampleAxis | None],
    gradients: tuple[Tensor, ...],
    output_axes: tuple[SampleAxis | None, ...],
) -> list[Tensor | None]:
    """Return the gradients, with those that are not finite as they are where no other sample takes part.

    The gradients of all others pass through the activations of a sample as zeros, and zero times infinity is not a
    number. So the function runs once more on a batch of nothing but the sample that is asked for.
    """
    spoiled = _not_finite([g for g in rows if g is not None])
    if not spoiled:
        return rows
    rows = [None if g is None else g.clone() for g in rows]  # rows may share their memory
    num_samples = next(len(g) for g in rows if g is not None)
    for i in spoiled:
        alone = tuple(_repeated(t, axis, i, num_samples) for t, axis in zip(saved, axes, strict=True))
        its_own = _masked(replay, alone, gradients, output_axes, num_samples, i)
        for g, own in zip(rows, its_own, strict=True):
            if g is not None and own is not None:
                g[i] = own[0]
    return rows


def _not_finite(rows: Sequence[Tensor]) -> list[int]:
    """Return the samples for which any of the gradients ``[B, ...]`` is not finite."""
    if not rows:
        return []
    found: list[int] = (~torch.stack([g.flatten(1).isfinite().all(1) for g in rows]).all(0)).nonzero()[:, 0].tolist()
    return found


def _repeated(t: Tensor, axis: SampleAxis | None, sample: int, num_samples: int) -> Tensor:
    """Return a tensor in which the rows of every sample are those of one; indices are as finite as they were."""
    if axis is None or t.layout is not torch.strided or _is_index(t, axis):
        return t
    rows = axis.split(t, num_samples)
    return axis.join(rows[sample].expand_as(rows)[None])[0]


def _one_at_a_time(g: Tensor, axis: SampleAxis | None, num_samples: int) -> Tensor:
    """Return ``[B, *g.shape]``: for every sample, ``g`` with the rows of all others zero, or its share of a sum."""
    if axis is None:
        return (g / num_samples).expand(num_samples, *g.shape)
    split = axis.split(g, num_samples)
    alone = torch.diag_embed(split.movedim(0, -1)).movedim((-2, -1), (0, 1))  # [B, B, ..., rows, ...]
    return axis.join(alone)


def _axis(axes: tuple[SampleAxis | None, ...], at: int) -> SampleAxis | None:
    return axes[at] if axes else None
