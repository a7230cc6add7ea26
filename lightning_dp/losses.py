"""Losses whose gradient is a mean over samples, as clipping per sample needs it.

Owns: the reduction of token losses. Does not own: the losses.
"""

from __future__ import annotations

from torch import Tensor


def per_sample_mean(loss: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over the samples of each sample's own mean over its positions.

    The usual mean over all tokens of a batch weighs a sample by the lengths of the others, so that removing one sample
    changes the gradients of all: no clipping bounds that. Here every sample has the same weight, whatever its length.

    Args:
        loss: A loss for every position, ``[B, ...]``, such as ``cross_entropy(..., reduction="none")`` brought back
            to the shape of the labels. Legend: B samples.
        mask: Which positions count, of the same shape, boolean or weights; ``None`` for all. A sample without any
            position that counts has the loss 0.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes differ, or ``loss`` has no sample axis.

    Example:
        >>> token_loss = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)  # doctest: +SKIP
        >>> loss = per_sample_mean(token_loss, labels != -100)  # doctest: +SKIP
    """
    if loss.dim() == 0:
        raise ValueError("per_sample_mean got a scalar loss: expected one loss per position, [B, ...].")
    if mask is None:
        return loss.flatten(1).mean(1).mean() if loss.dim() > 1 else loss.mean()
    if mask.shape != loss.shape:
        raise ValueError(f"per_sample_mean got a loss of shape {tuple(loss.shape)} and a mask of {tuple(mask.shape)}.")
    weight = mask.to(loss.dtype).reshape(loss.shape[0], -1)
    # where, not times: the loss of a masked position may be infinite.
    counted = loss.reshape(loss.shape[0], -1).masked_fill(weight == 0, 0) * weight
    total = weight.sum(1)
    return (counted.sum(1) / total.masked_fill(total == 0, 1)).mean()
