"""Per-layer clipping: every group of parameters is clipped on its own.

Owns: the groups, and the bound of each. Group-wise clipping: arXiv 2212.01539, sections 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_dp.clipping.base import Clipping, Part
from lightning_dp.clipping.by_norm import FlatClipping
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.patterns import matches

_BUDGETS = ("equal", "size")


class PerLayerClipping(Clipping):
    """Shortens the gradient of every layer, or every other group of parameters, to a bound of its own.

    Group k is clipped at C_k, with ``sqrt(sum_k C_k^2) = C``. So the sensitivity is C, as with one bound for all, and
    the noise is the same. No layer waits for the norms of the others.

    A layer is what a module holds itself: its weight and its bias. A parameter that several modules share is in the
    group of the first of them only.

    Guarantee: as of `Clipping`. A group whose gradient is not finite for some sample adds nothing of that sample; its
    other groups do.

    Args:
        max_grad_norm: C > 0, the largest norm of what one sample adds to all groups together.
        groups: Names of groups, each with the parameters in it: parts of dotted names (``"head"`` is ``head.weight``
            and ``model.head.bias``) or patterns (``"*.norm*.weight"``). A parameter is in the first group that fits;
            what no group names is grouped by layer.
        budgets: How C is shared among K groups. ``"equal"``: ``C_k = C / sqrt(K)``. ``"size"``: ``C_k = C sqrt(d_k /
            d)``, for d_k of all d elements.

    Raises:
        PrivacyConfigurationError: If a value is not of that kind.
    """

    def __init__(
        self, max_grad_norm: float = 1.0, groups: dict[str, list[str]] | None = None, budgets: str = "equal"
    ) -> None:
        super().__init__(max_grad_norm)
        if budgets not in _BUDGETS:
            raise PrivacyConfigurationError(f"budgets={budgets!r}: expected one of {list(_BUDGETS)}.")
        self.groups, self.budgets = _checked_groups(groups or {}), budgets

    def parts(self, sizes: Mapping[str, int]) -> Sequence[Part]:
        """Return the groups, in the order of their first parameters."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for name in sizes:
            grouped.setdefault(self._group_of(name), []).append(name)
        shares = [self._share([sizes[name] for name in names]) for names in grouped.values()]
        bounds = [self.max_grad_norm * math.sqrt(share / sum(shares)) for share in shares]
        return [Part(FlatClipping(bound), tuple(names)) for bound, names in zip(bounds, grouped.values(), strict=True)]

    def check_names(self, names: Iterable[str]) -> None:
        """Check that every pattern fits a parameter.

        Raises:
            PrivacyConfigurationError: If one does not.
        """
        known = list(names)
        for group, patterns in self.groups.items():
            for pattern in patterns:
                if not any(matches(name, pattern) for name in known):
                    raise PrivacyConfigurationError(
                        f"PerLayerClipping: {pattern!r} of the group {group!r} fits no parameter; there are "
                        f"{', '.join(known[:5])}, ..."
                    )

    def _group_of(self, name: str) -> tuple[str, str]:
        for group, patterns in self.groups.items():
            if any(matches(name, pattern) for pattern in patterns):
                return "group", group
        return "layer", name.rpartition(".")[0]

    def _share(self, sizes: Sequence[int]) -> float:
        """Return what is proportional to the squared bound of a group; a layer of no elements has one, too."""
        return 1.0 if self.budgets == "equal" else float(max(1, sum(sizes)))

    def __str__(self) -> str:
        named = f"{len(self.groups)} named groups, " if self.groups else ""
        return f"per_layer ({named}{'equal bounds' if self.budgets == 'equal' else 'bounds by size'})"


def _checked_groups(groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return the groups, each as a tuple of patterns."""
    if not isinstance(groups, Mapping):
        raise PrivacyConfigurationError(f"groups={groups!r}: expected names of groups, each with a list of patterns.")
    for group, patterns in groups.items():
        a_list = isinstance(patterns, Sequence) and not isinstance(patterns, str)
        if not a_list or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise PrivacyConfigurationError(
                f"groups: {group!r} has {patterns!r}, expected a list of names or patterns of parameters."
            )
    return {group: tuple(patterns) for group, patterns in groups.items()}
