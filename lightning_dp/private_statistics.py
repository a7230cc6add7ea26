"""Statistics of a logical batch that are NOT private: norms, the clipped share, the training loss.

Owns: collecting them, if the user has asked for it. Does not own: showing them (``callbacks``).

They depend on single examples without noise, so whoever sees them has seen more than epsilon accounts for: a norm that
is published is a release (arXiv 1607.00133, section 5, notes the same of adaptive bounds).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dp.processes import Processes


class PrivateStatistics:
    """Collects over the physical batches of one logical batch.

    | logical batch | values |
    |---|---|
    | empty draw | none |
    | norms that are not finite | such a sample counts as clipped, and not towards the median |
    """

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._clipped: list[Tensor] = []
        self._losses: list[tuple[Tensor, int]] = []

    def begin(self) -> None:
        """Begin a logical batch."""
        self._norms.clear()
        self._clipped.clear()
        self._losses.clear()

    def add_norms(self, *groups: tuple[Tensor, float]) -> None:
        """Add norms of drawn samples, before clipping; a sample is clipped if its gradient of some group is.

        Args:
            *groups: For each group of parameters that is clipped on its own, the norms, shape ``[B]``, not squared,
                and the largest one that is left as it is.
        """
        norms = torch.stack([norm.detach().to(groups[0][0]) for norm, _ in groups])
        clipped = torch.stack([~(norm <= bound) for norm, (_, bound) in zip(norms, groups, strict=True)])
        self._norms.append(norms[0] if len(groups) == 1 else torch.linalg.vector_norm(norms, dim=0))
        self._clipped.append(clipped.any(0))

    def add_loss(self, mean_loss: Tensor, num_real: int) -> None:
        """Add the mean loss of a physical batch with so many drawn samples."""
        if num_real:
            self._losses.append((mean_loss.detach(), num_real))

    def join(self, processes: Processes) -> None:
        """Collect over all processes, too: those without samples add nothing."""
        norms, clipped, losses = zip(*processes.gather((self._norms, self._clipped, self._losses)), strict=True)
        self._norms, self._clipped, self._losses = sum(norms, []), sum(clipped, []), sum(losses, [])

    def values(self) -> dict[str, float]:
        """Return ``clipped_share``, ``grad_norm`` (the median) and ``train_loss``, as far as there was something."""
        found: dict[str, float] = {}
        norms = torch.cat(self._norms) if self._norms else torch.empty(0)
        if norms.numel():
            found["clipped_share"] = float(torch.cat(self._clipped).double().mean())
            finite = norms[norms.isfinite()]
            found.update({"grad_norm": float(finite.median())} if finite.numel() else {})
        if self._losses:
            total = sum(num_real for _, num_real in self._losses)
            found["train_loss"] = sum(float(loss) * num_real for loss, num_real in self._losses) / total
        return found
