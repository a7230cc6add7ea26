"""Which dataloaders can be sampled by Poisson sampling; every other one is refused, never approximated.

Owns: the refusals. Does not own: the sampling (``poisson``).
"""

from __future__ import annotations

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning_dp.errors import PrivacyConfigurationError

_HOW = "Pass torch.utils.data.DataLoader(dataset, batch_size=expected_batch_size, shuffle=True)"


def check_dataloader(loader: object) -> DataLoader[object]:
    """Return ``loader`` if its examples can be drawn by Poisson sampling instead.

    Raises:
        PrivacyConfigurationError: If that would not be what the loader's own settings ask for.
    """
    if not isinstance(loader, DataLoader):
        raise PrivacyConfigurationError(
            f"the train dataloader is a {type(loader).__name__}: expected a DataLoader. {_HOW}."
        )
    _check_dataset(loader.dataset)
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise PrivacyConfigurationError(
            f"the train dataloader is a {type(loader).__name__}, which iterates in its own way, so its examples "
            f"cannot be drawn independently. {_HOW}; what it does to a batch belongs in collate_fn."
        )
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        raise _wrong_sampler("batch_sampler", loader.batch_sampler)
    if loader.batch_size is None:
        raise PrivacyConfigurationError(f"batch_size=None: expected the expected batch size. {_HOW}.")
    _check_sampler(loader.sampler)
    return loader


def _check_dataset(dataset: Dataset[object]) -> None:
    if isinstance(dataset, IterableDataset):
        raise PrivacyConfigurationError(
            f"the train dataset is an IterableDataset ({type(dataset).__name__}): Poisson sampling includes every "
            "example with the same probability, which needs access by index. Expected a dataset with __getitem__ and "
            "__len__."
        )
    size = len(dataset) if hasattr(dataset, "__len__") else 0
    if size < 1:
        raise PrivacyConfigurationError(
            f"the train dataset ({type(dataset).__name__}) has {size} examples by __len__: expected at least one."
        )


def _check_sampler(sampler: object) -> None:
    original = sampler
    if isinstance(sampler, DistributedSampler) and type(sampler) is not DistributedSampler:
        original = getattr(sampler.dataset, "_sampler", sampler)  # Lightning wraps custom samplers so
    if type(original) not in (RandomSampler, SequentialSampler, DistributedSampler):
        raise _wrong_sampler("sampler", original)


def _wrong_sampler(argument: str, sampler: object) -> PrivacyConfigurationError:
    kind = "Sampler" if isinstance(sampler, Sampler) else "iterable"
    return PrivacyConfigurationError(
        f"{argument}={type(sampler).__name__} ({kind}) chooses examples in its own way; the privacy accounting holds "
        f"for Poisson sampling only, where each example is drawn with the same probability. {_HOW}, without {argument}."
    )
