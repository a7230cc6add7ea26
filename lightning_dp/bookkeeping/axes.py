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
        rows: Rows of one sample when it was observed; 1 is binding, more may change with the sequence length.
        rows_outermost: Whether the axis runs over (row, sample) rather than over (sample, row).
    """

    dim: int
    rows: int
    rows_outermost: bool = False

    def split(self, t: Tensor, num_samples: int) -> Tensor:
        """Return ``t`` with a new leading axis over the samples; axis ``dim`` keeps the rows of one sample.

        Raises:
            UnsupportedModelError: If the axis does not hold the same number of rows for every sample.
        """
        rows, rest = divmod(t.shape[self.dim], num_samples)
        if rest or (self.rows == 1 and rows != 1) or rows == 0:
            raise UnsupportedModelError(
                f"axis {self.dim} of a tensor of shape {tuple(t.shape)} held {self.rows} row(s) of each sample when it "
                f"was observed, but does not divide so among the {num_samples} samples of this batch. Rows that are "
                "routed or filtered by their content have no per-sample gradient here: freeze the parameter that "
                "they enter, or keep the number of rows fixed (mask instead of filter)."
            )
        if self.rows_outermost:
            return t.unflatten(self.dim, (rows, num_samples)).movedim(self.dim + 1, 0)
        return t.unflatten(self.dim, (num_samples, rows)).movedim(self.dim, 0)

    def with_rows_outermost(self) -> SampleAxis:
        """Return the same axis, running over (row, sample)."""
        return replace(self, rows_outermost=True)


def merge_rows(split: Tensor, feature_dims: int) -> Tensor:
    """Return ``[B, T, *features]`` from ``[B, ..., *features]``: all that is neither sample nor feature is T.

    Args:
        split: A tensor with the samples in its leading axis.
        feature_dims: The number of trailing axes to keep.
    """
    end = split.dim() - feature_dims
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
