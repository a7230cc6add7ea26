"""What the guarantee does not cover, as far as facts tell, and what no fact can tell.

Owns: the list. Does not own: the facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_dp.record import Record, Watched


@dataclass(frozen=True)
class Limit:
    """Something that the guarantee does not cover.

    Args:
        subject: What it is about, in a word.
        text: What is not covered.
        found: The names that were found in this run; empty if none were, or nothing can be found.
    """

    subject: str
    text: str
    found: tuple[str, ...] = ()


def limits_of(record: Record, watched: Watched | None) -> tuple[Limit, ...]:
    """Return what the guarantee of a run does not cover, what is most at odds with it first.

    Args:
        record: The facts.
        watched: What a callback saw; ``None`` if there was none.
    """
    unseen = () if watched is not None else (_UNSEEN,)
    return (*_from_facts(record, watched), *unseen, *_ALWAYS)


def _from_facts(record: Record, seen: Watched | None) -> Iterator[Limit]:
    watched = seen or Watched()
    if record.private_statistics:
        yield Limit(
            "private statistics",
            "Statistics of gradients were shown or logged without noise (private_statistics=True). They are not in "
            "epsilon: whoever sees them, the figure and the history of this report included, learns about the "
            "training data.",
        )
    if record.public_mix:
        yield Limit(
            "public data",
            f"Steps were made on data that was declared public, too (PublicPretraining, mix={record.public_mix!r}), "
            "without clipping and noise. Its examples are not protected; if one is private nevertheless, or tells of "
            "somebody in the private data, epsilon does not cover that.",
        )
    yield Limit(
        "training metrics",
        "Values that were logged while training, such as the training loss, have no noise and are not in epsilon; so "
        f"is what reacts to them. {'' if watched.training_metrics or seen is None else _NONE_LOGGED}What code prints, "
        "or writes past self.log, is not seen here.",
        watched.training_metrics,
    )
    yield Limit(
        "validation and test data",
        "Their examples are not protected, neither in the metrics nor in choices made by them.",
        watched.validation_metrics,
    )
    if record.training is None:
        return
    if record.training.public:
        yield Limit(
            "parameters without noise",
            "Trained without noise: no example took part in their gradients, as far as torch's operators tell.",
            tuple(parameter.name for parameter in record.training.public),
        )
    if record.training.self_check.result in ("off", "too few samples"):
        yield Limit(
            "self-check",
            "It was not checked that no example changes the gradient of another. If one does, as with statistics of "
            "the batch in the loss, the clipping does not bound what an example adds, and epsilon does not hold.",
        )
    yield Limit(
        "hooks and callbacks",
        "Code that runs around training steps may read the training data and keep or write what it reads.",
        (*watched.hooks, *watched.callbacks),
    )


_NONE_LOGGED = "No name was logged by self.log. "

_UNSEEN = Limit(
    "names",
    "Which names were logged, and which hooks and callbacks ran, is not known: no PrivacyReport was among the "
    "callbacks, or the checkpoint holds weights only.",
)

_ALWAYS = (
    Limit("other runs", "Other runs on the same data, such as those that chose settings: their epsilons add up."),
    Limit(
        "statistics of the data",
        "Statistics that were computed from the training data beforehand, such as means for normalisation, a "
        "vocabulary or class weights.",
    ),
    Limit("the number of examples", "It is treated as public: the sample rate and the default delta tell it."),
)
