"""A random search with a random end: hyper-parameters at random, a random number of times, and the best is released.

Owns: the loop, and what it returns. Does not own: what is kept on disk (``candidates``), the runs (``fits``), or what
the search costs (``accounting.best_of``).

Liu and Talwar 2019 (arXiv 1811.07971), Papernot and Steinke 2022 (arXiv 2110.03620): the best of K runs, with K drawn
beforehand and never told, costs about twice what one run costs where 10 are expected, and little more for more of them,
as long as nothing of the other runs is released.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_dp.accounting import Phase, RDPBestOf, Repetitions
from lightning_dp.strategies import DPStrategy
from lightning_dp.strategies.undisturbed import same_random_numbers
from lightning_dp.tuning.candidates import BEST, Candidates, RandomSearch
from lightning_dp.tuning.fits import Fit
from lightning_dp.tuning.scores import choice


@dataclass(frozen=True)
class RandomSearchResult:
    """What a random search has found and spent: nothing else of it may be released.

    Args:
        values: The hyper-parameters of the best run.
        score: Its score.
        epsilon: Of the whole search, at ``delta``: an upper bound, in nats.
        delta: In (0, 1).
        target_epsilon: The budget of the search, in nats.
        repetitions: The distribution of the number of runs.
        noise_multiplier: Of every step of every run.
        num_steps: Of every run.
        checkpoint: The best run's, with its own ledger and the accountant of the search.
        monitor: The metric that chose.
        score_is_private: Whether the score is a noisy one of private validation data, and part of epsilon.
    """

    values: Mapping[str, float]
    score: float
    epsilon: float
    delta: float
    target_epsilon: float
    repetitions: Repetitions
    noise_multiplier: float
    num_steps: int
    checkpoint: Path
    monitor: str
    score_is_private: bool = False

    def print(self) -> None:
        """Print the best run, and what the search cost."""
        table = Table(title="Private random search", title_justify="left", caption_justify="left", show_header=False)
        for name, value in self.values.items():
            table.add_row(name, f"{value:.4g}")
        table.add_row("steps", f"{self.num_steps}")
        table.add_row(self.monitor, f"{self.score:.4f}")
        table.caption = (
            f"In all: epsilon {self.epsilon:.4f} of {self.target_epsilon:g} at delta {self.delta:g}, for the best of a "
            f"random number of runs ({self.repetitions.mean:g} expected, shape {self.repetitions.shape:g}). It covers "
            "this run and that it was chosen; how many runs there were, how long they took and what came out of the "
            f"others must stay unknown. {choice(self.score_is_private)}\nWeights: {self.checkpoint}"
        )
        Console().print(table)


def run_random_search(search: RandomSearch, strategy: DPStrategy, directory: Path, fit: Fit) -> RandomSearchResult:
    """Make all runs that are not made yet, and keep the best.

    Guarantee: the best run, with the choice, spends at most ``target_epsilon``; see `RDPBestOf` for what that takes.
    The noise of every run is calibrated by the bound on the whole search.

    Args:
        search: What is searched for.
        strategy: Checked; the arguments of every run's.
        directory: Where the search is recorded. It is private until the search has ended.
        fit: Makes a run.
    """
    accountant, candidates = RDPBestOf(search.repetitions), Candidates(directory, search)
    with candidates.alone(), same_random_numbers():  # how far they have gone would tell the number of runs
        candidates.begin()
        while (run := candidates.next()) is not None:
            assert run.checkpoint is not None, "the best run's weights are what is searched for"
            own = strategy.another(accountant=accountant)
            own._run.keep_in(run.checkpoint.parent, None)
            candidates.end(fit(run, own))
        best = candidates.close()
    mechanism = best["mechanism"]
    phase = Phase(mechanism["noise_multiplier"], mechanism["sample_rate"], mechanism["num_steps"])
    scores = [] if search.selection is None else [search.selection.phase]
    epsilon = accountant.epsilon([phase, *scores], search.target_delta)
    assert epsilon <= search.target_epsilon, "the budget of every run refuses a release that exceeds it"
    return RandomSearchResult(
        best["values"],
        best["score"],
        epsilon,
        search.target_delta,
        search.target_epsilon,
        search.repetitions,
        phase.noise_multiplier,
        phase.num_releases,
        directory / BEST,
        search.monitor,
        search.selection is not None,
    )
