"""What a data set says of its examples' owners must arrive, or be refused: never silently lost."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, StackDataset, Subset, TensorDataset, random_split

import lightning_dp as ldp
from lightning_dp.data import units_of
from lightning_dp.noise import SecretRandom

IDS = ["b", "a", "b", "c", "a", "b"]


def plain(n=6):
    return TensorDataset(torch.arange(n))


def private(ids=IDS, **kwargs):
    return ldp.PrivateDataset(plain(len(ids)), user_ids=ids, **kwargs)


def owned(dataset, ids=IDS):
    """Return the original examples of every unit, by their owner's name."""
    units = units_of(dataset)
    every = [units.examples_of([unit] * 100, SecretRandom()) for unit in range(units.num_units)]
    found = [{int(dataset[i][0]) for i in examples} for examples in every]
    return {ids[min(examples)]: examples for examples in found}


class Transformed(Dataset):
    """A wrapper as users write it, under any attribute."""

    def __init__(self, name, value):
        setattr(self, name, value)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor(index)


class Many(TensorDataset):
    def __getitems__(self, indices):
        return [(index, "at once") for index in indices]


class Reader:
    """No Dataset by class; torch takes it all the same."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index


def test_it_is_the_dataset_inside():
    data = private()
    assert len(data) == 6
    assert data[2] == (torch.tensor(2),)
    assert data.__getitems__([1, 3]) == [(torch.tensor(1),), (torch.tensor(3),)]
    assert ldp.PrivateDataset(Many(torch.arange(3))).__getitems__([2]) == [(2, "at once")]


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        tuple(IDS),
        np.array(IDS),
        np.array(IDS, dtype=object),
        [np.str_(name) for name in IDS],
        [2, 1, 2, 3, 1, 2],
        np.array([2, 1, 2, 3, 1, 2], dtype=np.uint8),
        [np.int64(n) for n in (2, 1, 2, 3, 1, 2)],
        torch.tensor([2, 1, 2, 3, 1, 2]),
        [2**70, 1, 2**70, -3, 1, 2**70],
        ["b\0", "b", "b\0", "", "b", "b\0"],
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_ids_of_any_kind_say_the_same(ids):
    data = ldp.PrivateDataset(plain(), user_ids=ids)
    assert owned(data) == {"a": {1, 4}, "b": {0, 2, 5}, "c": {3}}


def test_what_is_changed_later_does_not_count():
    ids = torch.tensor([0, 0, 1])
    data = ldp.PrivateDataset(plain(3), user_ids=ids)
    ids[:] = 7
    assert units_of(data).num_units == 2


def test_subsets_keep_it():
    data = private(examples_per_user=2, partition="x")
    subset = Subset(Subset(data, [5, 4, 3, 2, -6]), torch.tensor([4, 1, 2]))  # examples 0, 4, 3
    units = units_of(subset)
    assert (units.unit, units.num_units, units.examples_per_unit, units.partition) == ("user", 3, 2, "x")
    assert owned(subset) == {"a": {4}, "b": {0}, "c": {3}}
    assert units_of(Subset(data, [True, False])).num_units == 2  # as a list is indexed: examples 1 and 0


def test_random_splits_keep_it():
    data = private()
    for part in random_split(data, [4, 2], generator=torch.Generator().manual_seed(0)):
        held = {int(x) for (x,) in part}
        assert owned(part) == {n: own & held for n, own in owned(data).items() if own & held}


def test_without_users_the_unit_is_the_example():
    units = units_of(ldp.PrivateDataset(plain(), partition="x"))
    assert (units.unit, units.num_units, units.partition) == ("example", 6, "x")
    units = units_of(Subset(ldp.PrivateDataset(plain(), partition="x"), [1, 2]))
    assert (units.unit, units.num_units, units.partition) == ("example", 2, "x")
    assert (units_of(plain()).unit, units_of(plain()).partition) == ("example", None)
    assert units_of(Subset(plain(), [1, 2])).num_units == 2


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda d: ConcatDataset([plain(), d]),
        lambda d: StackDataset(d, d),
        lambda d: StackDataset(image=plain(), text=d),
        lambda d: Transformed("dataset", d),
        lambda d: Transformed("_anything", d),
        lambda d: Transformed("parts", [plain(), d]),
        lambda d: Transformed("parts", {"train": (d, 3), "more": d}),
        lambda d: Transformed("dataset", Subset(d, [1])),
        lambda d: Transformed("dataset", ConcatDataset([Transformed("base", d)])),
        lambda d: Transformed("reader", Reader(d)),
        lambda d: Reader(d),
        lambda d: [d],
        lambda d: type("Other", (Subset,), {})(d, [1, 2]),
        lambda d: Subset(Transformed("dataset", d), [1, 2]),
    ],
)
def test_anything_else_around_it_is_refused(wrapped):
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"with a PrivateDataset inside.*Let it be the dataset"):
        units_of(wrapped(private()))
    assert units_of(wrapped(plain())).unit == "example"
    with pytest.raises(ldp.PrivacyConfigurationError, match="another PrivateDataset in it: which of them holds"):
        ldp.PrivateDataset(wrapped(private()))


def test_one_in_another_is_refused():
    with pytest.raises(ldp.PrivacyConfigurationError, match="PrivateDataset around a PrivateDataset"):
        ldp.PrivateDataset(private(), partition="x")


def test_a_dataset_that_holds_itself():
    data = Transformed("dataset", None)
    data.dataset = [data]
    assert units_of(data).unit == "example"


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1.0] * 6, "entries of type float, such as 1.0 at 0"),
        ([1, 2, float("nan"), 3, 4, 5], "entries of type float, int, such as nan at 2"),
        (torch.tensor([1.0] * 6), "entries of type float"),
        ([None] * 6, "entries of type NoneType, such as None at 0"),
        (["a", "b", None, "c", "d", "e"], "entries of type NoneType, str, such as None at 2"),
        ([1, 2, "2", 3, 4, 5], "entries of type int, str, such as 1 at 0"),
        ([True, False] * 3, "entries of type bool, such as True at 0"),
        ([0, 1, True, 1, 1, 1], "entries of type bool, int, such as True at 2"),
        (torch.tensor([True] * 6), "entries of type bool"),
        (list(torch.arange(6)), r"entries of type Tensor, such as tensor\(0\) at 0"),
        (torch.zeros(6, 2, dtype=torch.long), r"entries of type list, such as \[0, 0\] at 0"),
        ([b"a"] * 6, "entries of type bytes"),
        ([("a", 1)] * 6, "entries of type tuple"),
        (torch.tensor(3), "Tensor"),
        ("abcdef", "str"),
        (set("abcdef"), "set"),
        (dict.fromkeys(range(6), "a"), "dict"),
        (iter(range(6)), "range_iterator"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_ids_that_do_not_tell_users_apart(ids, words):
    with pytest.raises(ldp.PrivacyConfigurationError, match=rf"user_ids: found {words}"):
        ldp.PrivateDataset(plain(), user_ids=ids)


@pytest.mark.parametrize("ids", [IDS[:5], [*IDS, "d"], []])
def test_wrong_number_of_ids(ids):
    with pytest.raises(ldp.PrivacyConfigurationError, match=rf"user_ids has {len(ids)} entries for 6 examples"):
        ldp.PrivateDataset(plain(), user_ids=ids)


def test_a_dataset_that_has_grown_since():
    class Grows(list):
        pass

    inside = Grows([1, 2, 3])
    data = ldp.PrivateDataset(inside, user_ids=[1, 2, 3])
    inside.append(4)
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"user_ids has 3 entries for 4 examples .*Grows"):
        units_of(data)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2", None])
def test_bad_examples_per_user(count):
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"examples_per_user=.*: expected an integer of at least 1"):
        private(examples_per_user=count)


def test_examples_per_user_without_users():
    with pytest.raises(ldp.PrivacyConfigurationError, match="examples_per_user=2 without user_ids"):
        ldp.PrivateDataset(plain(), examples_per_user=2)


@pytest.mark.parametrize("partition", ["", 3, b"a"])
def test_bad_partition(partition):
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"partition=.*: expected a name, or None"):
        ldp.PrivateDataset(plain(), partition=partition)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize("dataset", [Stream(), iter([1]), 3, {1, 2}])
def test_no_access_by_index(dataset):
    with pytest.raises(ldp.PrivacyConfigurationError, match="expected a dataset with __getitem__ and __len__"):
        ldp.PrivateDataset(dataset)


@pytest.mark.parametrize("indices", [[0, 3, 0], [1, -5], [2, 2, 2]])
def test_an_example_that_is_there_twice_is_not_two_units(indices):
    subset = Subset(plain(), indices)
    for dataset in (subset, Subset(ldp.PrivateDataset(plain()), indices), Subset(subset, [0, 1])):
        if len({i % 6 for i in indices[: len(dataset)]}) < len(dataset):
            with pytest.raises(ldp.PrivacyConfigurationError, match=r"Subset with example \d [23] times"):
                units_of(dataset)
    owned = ldp.PrivateDataset(subset, user_ids=[i % 6 for i in indices])
    assert units_of(owned).num_units == len({i % 6 for i in indices})
