"""Where the samples of a batch lie in a tensor.

Owns: the sample axis of a tensor and the split along it. Does not own: how the axis is found (``observation``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_dp.errors import UnsupportedModelError

Split = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SampleAxis:
    """The axis ``dim`` of a tensor holds ``rows`` rows of every sample.

    Args:
        dim: The axis.
        rows: Rows of one sample when it was observed; 1 is binding, more may change with the sequence length unless
            ``fixed``.
        together: How many rows of one sample follow each other before those of the next: all for ``None``; one if the
            axis runs over (row, sample); and F where frames of a sample were merged with it and T tokens then put in
            front, as in ``[T * B * F]``. Any other number than one or all binds ``rows``.
        fixed: Whether ``rows`` is binding. It is where a sample consists of that many rows of the batch: were one row
            missing, those of the next sample would move up.
    """

    dim: int
    rows: int
    together: int | None = None
    fixed: bool = False

    @property
    def is_binding(self) -> bool:
        """Whether every sample must have ``rows`` rows."""
        return self.fixed or self.rows == 1

    @property
    def rows_outermost(self) -> bool:
        """Whether the axis runs over (row, sample)."""
        return self.together == 1

    def split(self, t: Tensor, num_samples: int) -> Tensor:
        """Return ``t`` with a new leading axis over the samples; axis ``dim`` keeps the rows of one sample.

        Raises:
            UnsupportedModelError: If the axis does not hold the same number of rows for every sample.
        """
        rows, rest = divmod(t.shape[self.dim], num_samples)
        if rest or (self.is_binding and rows != self.rows) or rows == 0:
            raise UnsupportedModelError(
                f"axis {self.dim} of a tensor of shape {tuple(t.shape)} held {self.rows} row(s) of each sample when it "
                f"was observed, but does not divide so among the {num_samples} samples of this batch. Rows that are "
                "routed or filtered by their content have no per-sample gradient here: freeze the parameter that "
                "they enter, or keep the number of rows fixed (mask instead of filter)."
            )
        if self.together is None:
            split = t.view(*t.shape[: self.dim], num_samples, rows, *t.shape[self.dim + 1 :])
            return split.movedim(self.dim, 0) if self.dim else split
        if self.together != 1 and rows != self.rows:
            raise UnsupportedModelError(
                f"axis {self.dim} of a tensor of shape {tuple(t.shape)} held {self.rows} rows of each sample when it "
                f"was observed, {self.together} of them together, and now holds {rows}: which belong to which sample "
                "cannot be told. Pad the samples to one length, or keep an axis of the samples alone."
            )
        split = t.unflatten(self.dim, (rows // self.together, num_samples, self.together)).movedim(self.dim + 1, 0)
        return split.flatten(self.dim + 1, self.dim + 2)

    def positions(self, t: Tensor, num_samples: int, feature_dims: int) -> Tensor:
        """Return ``[B, T, *features]``: all that is neither sample nor feature is T; see `split` and `merge_rows`."""
        if self.rows == 1 and self.dim == 0 and t.shape[0] == num_samples and t.dim() == 2 + feature_dims:
            return t  # as nearly always: it has that shape, and views take time
        return merge_rows(self.split(t, num_samples), feature_dims)

    def join(self, split: Tensor) -> Tensor:
        """Return ``[*, *t.shape]`` from ``[*, B, *]``, what `split` made of ``t``, with one more axis ahead of it."""
        together = self.together or split.shape[self.dim + 2]
        apart = split.unflatten(self.dim + 2, (-1, together)).movedim(1, self.dim + 2)
        return apart.flatten(self.dim + 1, self.dim + 3)

    def ordered(self, together: int) -> SampleAxis:
        """Return the same axis with so many rows of a sample together."""
        return replace(self, together=None if together == self.rows else together)


def merge_rows(split: Tensor, feature_dims: int) -> Tensor:
    """Return ``[B, T, *features]`` from ``[B, ..., *features]``: all that is neither sample nor feature is T.

    Args:
        split: A tensor with the samples in its leading axis.
        feature_dims: The number of trailing axes to keep.
    """
    end = split.dim() - feature_dims
    if end == 2:
        return split
    return split.reshape(split.shape[0], -1, *split.shape[end:])


def find_axis(two: tuple[int, ...], three: tuple[int, ...]) -> SampleAxis | None:
    """Find the sample axis of a tensor from its shapes with two and with three samples.

    Returns:
        The axis, or ``None`` if the shape does not depend on the number of samples.

    Raises:
        ValueError: If the shapes do not scale exactly with the number of samples along one single axis.
    """
    changed = [k for k in range(len(three)) if len(two) != len(three) or two[k] != three[k]]
    if not changed and len(two) == len(three):
        return None
    if len(two) != len(three) or len(changed) > 1 or two[changed[0]] * 3 != three[changed[0]] * 2:
        raise ValueError(f"shape {list(two)} with two samples and {list(three)} with three")
    return SampleAxis(changed[0], three[changed[0]] // 3)
