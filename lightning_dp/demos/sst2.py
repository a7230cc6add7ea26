"""SST-2: 67,349 phrases of film reviews to train on and 872 sentences to test on, good or bad (Socher et al. 2013).

Owns: where they come from. Does not own: tokens (``sentence_data``) or the network (``sentences``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_dp.demos.sentence_data import Sentences

_NAME = ("nyu-mll/glue", "sst2")
_COMMAND = f"python -c \"import datasets; datasets.load_dataset('{_NAME[0]}', '{_NAME[1]}')\""


class SST2(Sentences):
    """The training sentences, and the validation sentences to test on, as the test labels are not public.

    Args:
        batch_size: Expected size of a logical batch.
        max_tokens: Longer sentences are cut.
        folder: A folder with ``train.tsv`` and ``dev.tsv`` as GLUE has them. Default: from the hub, by ``datasets``.
        encoder: Whose tokenizer: see `lightning_dp.demos.encoder`.
    """

    def __init__(
        self, batch_size: int = 1000, max_tokens: int = 64, folder: str | None = None, encoder: str | None = None
    ) -> None:
        super().__init__(batch_size, max_tokens, encoder)
        self.folder = folder

    def prepare_data(self) -> None:
        """Download the sentences, if need be."""
        if self.folder is None:
            from_hub()

    def setup(self, stage: str) -> None:
        """Make tokens."""
        if self.folder is None:
            found = from_hub()
            train, test = found["train"], found["validation"]
        else:
            train, test = (read_tsv(Path(self.folder) / name) for name in ("train.tsv", "dev.tsv"))
        self.train, self.test = (
            self.examples([row["sentence"] for row in rows], [int(row["label"]) for row in rows])
            for rows in (list(train), list(test))
        )


def read_tsv(file: Path) -> list[dict[str, str]]:
    """Return the rows of a file of GLUE: a head, and lines with tabs; quotes mean nothing in it."""
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    return [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]


def from_hub() -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """Return the parts of SST-2, by ``datasets``, which keeps them.

    Raises:
        RuntimeError: If they cannot be had; it names the command.
    """
    try:
        import datasets

        return datasets.load_dataset(*_NAME)
    except Exception as error:  # of the hub, of its HTTP library or of datasets: all of them end here
        raise RuntimeError(
            f"SST-2 could not be loaded: {error}\nWhere there is a network, run\n  pip install datasets && {_COMMAND}\n"
            "and copy the folder ~/.cache/huggingface; or give SST2(folder=...) with train.tsv and dev.tsv of GLUE."
        ) from error
