"""Sentences with labels as a data module: their tokens, padding and batches.

Owns: what all data of sentences have in common. Does not own: where they come from (``film_reviews``, ``sst2``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_dp.demos.encoder import load_tokenizer

Example = tuple[Tensor, int]
"""Numbers of tokens, ``[T]``, and a label."""


class Sentences(pl.LightningDataModule):
    """Sentences as tokens, padded to the longest of a batch, with their mask and label; ``setup`` finds them.

    Args:
        batch_size: Expected size of a logical batch.
        max_tokens: Longer sentences are cut.
        encoder: Whose tokenizer: see `lightning_dp.demos.encoder`.
    """

    train: Sequence[Example]
    test: Sequence[Example]

    def __init__(self, batch_size: int, max_tokens: int, encoder: str | None) -> None:
        super().__init__()
        self.batch_size, self.max_tokens, self.encoder = batch_size, max_tokens, encoder

    def examples(self, sentences: Sequence[str], labels: Sequence[int]) -> list[Example]:
        """Return sentences as tokens, with their labels."""
        tokenizer = load_tokenizer(self.encoder)
        cut = {"truncation": True, "max_length": self.max_tokens}
        tokens = [torch.tensor(tokenizer.encode(sentence, **cut)) for sentence in sentences]
        return list(zip(tokens, labels, strict=True))

    def train_dataloader(self) -> DataLoader[Any]:
        """Sentences to train on."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any]:
        """All held-out sentences."""
        return DataLoader(self.test, batch_size=128, collate_fn=collate)  # type: ignore[arg-type]


class InOrder:
    """Batches of ordinary training on a dataset in order of length, with as little padding as private ones have.

    As many random examples as a step has are divided into physical batches in their order; those are accumulated.

    Args:
        num_examples: Examples of the dataset.
        batch_size: Examples in a step; what is left of an epoch is dropped.
        physical: The most examples in a physical batch.
    """

    def __init__(self, num_examples: int, batch_size: int, physical: int) -> None:
        self.num_examples, self.batch_size, self.physical = num_examples, batch_size, physical

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the numbers of the examples of each physical batch."""
        for step in torch.randperm(self.num_examples).split(self.batch_size)[: self.num_examples // self.batch_size]:
            yield from (chunk.tolist() for chunk in step.sort().values.split(self.physical))

    def __len__(self) -> int:
        """Return the number of physical batches in an epoch."""
        return self.num_examples // self.batch_size * math.ceil(self.batch_size / self.physical)


def collate(examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens ``[B, T]``, their mask ``[B, T]`` and labels ``[B]``."""
    tokens = [sentence for sentence, _ in examples]
    mask = [torch.ones_like(sentence) for sentence in tokens]
    labels = torch.tensor([label for _, label in examples])
    return pad_sequence(tokens, batch_first=True), pad_sequence(mask, batch_first=True), labels
