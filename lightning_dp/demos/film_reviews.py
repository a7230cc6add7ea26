"""Sentences of film reviews, good or bad, without a hub: they are in the source distribution of a package.

Owns: where the sentences come from, and their split. Does not own: tokens (``sentence_data``) or the network
(``sentences``).

The sentences are those of the VADER authors (Hutto and Gilbert, ICWSM 2014), cut from the film reviews of Pang and Lee,
of which SST-2 is made too. The mean of about 20 ratings says how good each is.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from sklearn.model_selection import train_test_split

from lightning_dp.demos.sentence_data import Example, Sentences

CACHE = Path.home() / ".cache" / "lightning_dp" / "film_reviews.txt"
_DOWNLOAD = ("-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "vaderSentiment==3.3.2")
_OUTER, _INNER = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"


def reviews_file(cached: Path = CACHE) -> Path:
    """Return the file of all sentences; the first call downloads it, by pip.

    Args:
        cached: Where it is kept.

    Raises:
        RuntimeError: If it cannot be downloaded; it names the command.
    """
    if not cached.exists():
        with tempfile.TemporaryDirectory() as folder:
            content = _member(_member(_downloaded(Path(folder)).read_bytes(), _OUTER), _INNER)
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(".unfinished")
        unfinished.write_bytes(content)
        unfinished.replace(cached)
    return cached


def read_reviews(file: Path) -> tuple[list[str], list[int]]:
    """Return the sentences, and 1 for each with a mean rating above zero, else 0.

    Args:
        file: Lines of a number, a mean rating and a sentence, with tabs between them.
    """
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [sentence.strip() for _, _, sentence in rows], [int(float(rating) > 0) for _, rating, _ in rows]


class FilmReviews(Sentences):
    """Sentences as tokens, in the order of their length, padded to the longest of a batch, with mask and label.

    Args:
        batch_size: Expected size of a logical batch.
        max_tokens: Longer sentences are cut.
        held_out: How many sentences are kept to test on.
        num_examples: Train on so many only. Default: all others, 9,500.
        file: The sentences. Default: downloaded once, see `reviews_file`.
        encoder: Folder of an encoder, for its tokenizer. Default: see `lightning_dp.demos.encoder`.
    """

    def __init__(
        self,
        batch_size: int = 512,
        max_tokens: int = 48,
        held_out: int = 1105,
        num_examples: int | None = None,
        file: str | None = None,
        encoder: str | None = None,
    ) -> None:
        super().__init__(batch_size, max_tokens, encoder)
        self.file, self.held_out, self.num_examples = file, held_out, num_examples

    def prepare_data(self) -> None:
        """Download the sentences, if need be."""
        if self.file is None:
            reviews_file()

    def setup(self, stage: str) -> None:
        """Split, always the same way, and make tokens."""
        sentences, labels = read_reviews(Path(self.file) if self.file else reviews_file())
        examples = self.examples(sentences, labels)
        train, test = train_test_split(examples, test_size=self.held_out, random_state=0)
        # By length: draws are processed in the order of the dataset, so that a physical batch has little padding.
        self.train = sorted(train[: self.num_examples], key=_length)
        self.test = sorted(test, key=_length)


def _length(example: Example) -> int:
    return len(example[0])


def _downloaded(folder: Path) -> Path:
    """Return the source distribution, downloaded into a folder."""
    command = [sys.executable, *_DOWNLOAD, "--dest", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.tar.gz"))
    if ended.returncode or not found:
        raise RuntimeError(
            f"the film reviews could not be downloaded. Run\n    python {' '.join(_DOWNLOAD)}\nwhere there is a "
            f"network, take {_INNER} out of {_OUTER} in it, and give its path as FilmReviews(file=...). pip said:\n"
            f"{ended.stderr.strip()[-1000:]}"
        )
    return found[0]


def _member(archive: bytes, name: str) -> bytes:
    """Return the content of a file with this name in a compressed archive, in whatever folder it is."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            content = files.extractfile(member) if Path(member.name).name == name else None
            if content is not None:
                return content.read()
    raise RuntimeError(f"the archive of the film reviews has no file {name}: it is not the version that is expected.")
