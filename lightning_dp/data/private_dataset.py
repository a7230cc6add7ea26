"""What must be known of a data set to say whom its training protects.

Owns: :class:`PrivateDataset`, and how what it says is found in the dataset of a dataloader. Does not own: the draws
(``poisson``), or which examples of a user are used (``units``).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from lightning_dp.data.units import ExampleUnits, Units, UserUnits
from lightning_dp.errors import PrivacyConfigurationError

T = TypeVar("T", covariant=True)

_OUTERMOST = (
    "Let it be the dataset of the dataloader, or wrap it in torch.utils.data.Subset (or random_split) only: put what "
    "transforms or joins examples inside, PrivateDataset(ConcatDataset([a.dataset, b.dataset]), "
    "user_ids=[*a.user_ids, *b.user_ids])."
)


class PrivateDataset(Dataset[T]):
    """A map-style dataset, with what it does not say itself: whose its examples are, and who else may be in other data.

    Everything else is as in the dataset inside. With ``user_ids``, privacy is for adding or removing one user with all
    their examples: each step draws every user with probability ``batch_size / (examples_per_user * number of users)``,
    takes m = ``examples_per_user`` of a drawn user's examples, and clips what they add together.

    A user with more than m examples gives a random m of them, anew in every step; a user with fewer gives all of them,
    repeated as evenly as possible. A user's gradient is the mean over these m rows (with ``loss_reduction="sum"``, the
    sum): all users have the same weight, whatever the number of their examples.

    With ``views_per_example=K``, every drawn example is K rows of the batch, each fetched anew: a dataset with a random
    transform gives K views of it, whose mean gradient is clipped as one (augmentation multiplicity, arXiv 2204.13650).
    ``batch_size`` counts examples, not views, so that sampling, noise and epsilon are those of one view.

    Args:
        dataset: With ``__getitem__`` and ``__len__``.
        user_ids: The user of every example, integers or strings, in the order of the examples: a list, an array or a
            tensor. Default: every example is somebody else's.
        examples_per_user: m, how many examples of a drawn user are in a logical batch.
        views_per_example: K, how many rows of a batch each of them is.
        partition: A name. Datasets of different names have nobody in common, so that what they spend is not added up:
            the greatest epsilon counts. Default: nothing is known, and it is added to all others.

    Raises:
        PrivacyConfigurationError: If ``dataset`` has no such access, there are more or fewer ``user_ids`` than
            examples, or an argument is not of its kind.

    Example:
        >>> data = PrivateDataset(notes, user_ids=patients, examples_per_user=4)  # doctest: +SKIP
        >>> loader = DataLoader(data, batch_size=256)  # 64 patients expected in a step  # doctest: +SKIP
    """

    def __init__(
        self,
        dataset: Dataset[T],
        *,
        user_ids: Sequence[int] | Sequence[str] | NDArray[Any] | Tensor | None = None,
        examples_per_user: int = 1,
        views_per_example: int = 1,
        partition: str | None = None,
    ) -> None:
        _check_access(dataset)
        self.dataset, self.partition = dataset, partition
        self.user_ids = None if user_ids is None else _plain_ids(user_ids)
        self.examples_per_user = _checked_count("examples_per_user", examples_per_user)
        self.views_per_example = _checked_count("views_per_example", views_per_example)
        if examples_per_user > 1 and user_ids is None:
            raise PrivacyConfigurationError(
                f"examples_per_user={examples_per_user} without user_ids: whose the examples are is not known. Give "
                "user_ids, the user of every example. To use several views of each example, give views_per_example."
            )
        self._check_length()
        if partition is not None and (not isinstance(partition, str) or not partition):
            raise PrivacyConfigurationError(f"partition={partition!r}: expected a name, or None.")
        if holds_private(dataset):
            raise PrivacyConfigurationError(
                f"PrivateDataset around a {type(dataset).__name__} that has another PrivateDataset in it: which of "
                "them holds is not known. Give all arguments to one, and wrap the dataset without it."
            )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> T:
        """Return one example."""
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Sequence[T]:
        """Return several examples, at once if the dataset inside can."""
        many = getattr(self.dataset, "__getitems__", None)
        return many(indices) if callable(many) else [self.dataset[i] for i in indices]

    def units(self, indices: NDArray[np.int64] | None = None) -> Units:
        """Return the units.

        Args:
            indices: The examples that count, which are then numbered in this order; ``None`` for all.
        """
        self._check_length()
        if self.user_ids is None:
            return ExampleUnits(len(self) if indices is None else len(indices), self.partition, self.views_per_example)
        users = _numbered(self.user_ids)
        own = users if indices is None else users[indices]
        return UserUnits(own, self.examples_per_user, self.partition, self.views_per_example)

    def _check_length(self) -> None:
        if self.user_ids is not None and len(self.user_ids) != len(self):
            raise PrivacyConfigurationError(
                f"user_ids has {len(self.user_ids)} entries for {len(self)} examples of the dataset "
                f"({type(self.dataset).__name__}): expected the user of every example, in the order of the examples."
            )


def units_of(dataset: Dataset[Any]) -> Units:
    """Return the units of the dataset of a dataloader: what a `PrivateDataset` says, else its examples.

    Raises:
        PrivacyConfigurationError: If a `PrivateDataset` is inside something that may have changed the examples, or if a
            `Subset` has an example twice, which would then be two units.
    """
    inner, at = dataset, None
    while type(inner) is Subset:
        # As a list is indexed: numpy would take booleans for a mask.
        indices = np.fromiter((int(i) for i in inner.indices), np.int64)
        inner, at = inner.dataset, indices if at is None else indices[at]
    if at is not None and getattr(inner, "user_ids", None) is None:
        _check_distinct(at % len(inner))  # type: ignore[arg-type]
    if isinstance(inner, PrivateDataset):
        return inner.units(at)
    if holds_private(inner):
        raise PrivacyConfigurationError(
            f"the train dataset is a {type(inner).__name__} with a PrivateDataset inside: which user an example then "
            f"belongs to is not known. {_OUTERMOST}"
        )
    return ExampleUnits(len(dataset))  # type: ignore[arg-type]


def _check_distinct(indices: NDArray[np.int64]) -> None:
    found, counts = np.unique(indices, return_counts=True)
    if len(found) < len(indices):
        raise PrivacyConfigurationError(
            f"the train dataset is a Subset with example {found[counts.argmax()]} {counts.max()} times: each would "
            "count as one of its own, and epsilon would not be for the example. Give every index once, or say whose "
            "they are: PrivateDataset(subset, user_ids=subset.indices)."
        )


def _check_access(dataset: Any) -> None:
    has_access = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not has_access:
        raise PrivacyConfigurationError(
            f"PrivateDataset got a {type(dataset).__name__}: expected a dataset with __getitem__ and __len__, since "
            "examples are drawn by their index."
        )


def _checked_count(name: str, count: Any) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise PrivacyConfigurationError(f"{name}={count!r}: expected an integer of at least 1.")
    return count


def _plain_ids(user_ids: Any) -> tuple[Hashable, ...]:
    """Return ids that are equal exactly if their users are the same.

    Anything else than integers or strings is not told apart reliably: NaN is not equal to itself, 1 equals 1.0 and
    True, and tensors are compared by where they lie in memory.
    """
    values = user_ids.tolist() if hasattr(user_ids, "tolist") else user_ids
    if not isinstance(values, Collection) or isinstance(values, str | bytes | Mapping | set | frozenset):
        raise _wrong_ids(f"{type(user_ids).__name__}")
    ids = tuple(values)
    numbers = [isinstance(value, Integral) and not isinstance(value, bool) for value in ids]
    texts = [isinstance(value, str) for value in ids]
    if not all(numbers) and not all(texts):
        kinds = sorted({type(value).__name__ for value in ids})
        at = next(k for k in range(len(ids)) if not (texts[k] if any(texts) else numbers[k]))
        raise _wrong_ids(f"entries of type {', '.join(kinds)}, such as {ids[at]!r} at {at}")
    return ids


def _wrong_ids(found: str) -> PrivacyConfigurationError:
    return PrivacyConfigurationError(
        f"user_ids: found {found}; expected a list, an array or a tensor with an integer for every example, or with a "
        "string for every example. Missing ids must be filled in: examples of an unknown user could be anybody's."
    )


def _numbered(ids: Iterable[Hashable]) -> NDArray[np.int64]:
    """Number the users in the order of their first example."""
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(user, len(numbers)) for user in ids), np.int64)


def holds_private(dataset: object) -> bool:
    """Whether a `PrivateDataset` is in an attribute of a dataset, or of one that it has, alone or among others."""
    seen: set[int] = set()
    waiting = [dataset]
    while waiting:
        found = waiting.pop()
        if isinstance(found, PrivateDataset):
            return True
        if id(found) not in seen:
            seen.add(id(found))
            waiting += filter(_may_hold, _parts(found))
    return False


def _parts(dataset: object) -> Iterable[object]:
    """Yield what a dataset holds, in collections too, but not in collections of collections: those are examples."""
    for value in (dataset, *getattr(dataset, "__dict__", {}).values()):
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list | tuple):
            yield from value
        elif value is not dataset:
            yield value


def _may_hold(value: object) -> bool:
    is_dataset = hasattr(type(value), "__getitem__") and hasattr(value, "__dict__")
    return isinstance(value, Dataset) or (is_dataset and not isinstance(value, Tensor | np.ndarray))
