"""The search: all runs in one ledger, within one budget.

Owns: the loop, and what it returns. Does not own: any of its parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_dp.strategies import DPStrategy
from lightning_dp.tuning.fits import Fit, FullBatches, Run, budget_of
from lightning_dp.tuning.history import History
from lightning_dp.tuning.scores import PrivateSelection, choice
from lightning_dp.tuning.shares import SearchPlan
from lightning_dp.tuning.trials import Outcome, Search, Trial

FINAL = "final.ckpt"


@dataclass(frozen=True)
class TuningResult:
    """What a search has found and spent.

    Args:
        outcomes: Of all runs in their order, the final one last.
        plan: How the budget was divided.
        epsilon: What all runs together spent, at ``plan.target_delta``: an upper bound, in nats.
        num_releases: Noisy steps of all runs, interrupted ones included, and scores that were paid for.
        checkpoint: The final run's, with the ledger of all runs.
        monitor: The metric that chose.
    """

    outcomes: tuple[Outcome, ...]
    plan: SearchPlan
    epsilon: float
    num_releases: int
    checkpoint: Path
    monitor: str

    @property
    def final(self) -> Outcome:
        """The final run."""
        return self.outcomes[-1]

    def print(self) -> None:
        """Print the runs, and what they cost together."""
        table = Table(title="Private search", title_justify="left", caption_justify="left")
        for name in ("run", "epsilon", "lr", "steps", "lr × steps", self.monitor):
            table.add_column(name, justify="left" if name == "run" else "right")
        for number, one in enumerate(self.outcomes, 1):
            final = number == len(self.outcomes)
            values = (f"{one.epsilon:.4g}", f"{one.lr:.4g}", f"{one.num_steps}", f"{one.r:.4g}", f"{one.score:.4f}")
            table.add_row("final" if final else f"{number}", *values, style="bold" if final else None)
        table.caption = (
            f"In all: epsilon {self.epsilon:.4f} of {self.plan.target_epsilon:g} at delta {self.plan.target_delta:g}, "
            f"{self.num_releases} full-batch releases. It covers the choice of learning rate and steps by these runs. "
            f"{choice(self.plan.score_mu > 0)}\nWeights: {self.checkpoint}"
        )
        Console().print(table)


def run_search(search: Search, strategy: DPStrategy, directory: Path, fit: Fit) -> TuningResult:
    """Make all runs that are not made yet.

    Guarantee: all runs of this search, in this process and in those before it, in the same directory, spend at most
    ``target_epsilon`` of the strategy; a release that does not fit is refused before it is made.

    Args:
        search: What is searched for.
        strategy: Checked; it holds the ledger of all runs.
        directory: Where the search is recorded, and the journal kept.
        fit: Makes a run; leaves the weights of the final one in the file ``final.ckpt`` there.
    """
    history = History(directory, search)
    with history.alone():
        history.read()
        _make_runs(search, strategy, history, fit)
    run = strategy._run
    target, delta = search.plan.target_epsilon, search.plan.target_delta
    accountant = run.settings.accountant_for(delta)
    epsilon = max(accountant.epsilon(phases, delta) for phases in run.ledger.histories())
    assert epsilon <= target, "the budget refuses a release that exceeds it"
    num, checkpoint = run.ledger.num_releases, directory / FINAL
    return TuningResult(tuple(history.outcomes), search.plan, epsilon, num, checkpoint, search.monitor)


def _make_runs(search: Search, strategy: DPStrategy, history: History, fit: Fit) -> None:
    """Make the runs that are left, each on disk before the next."""
    run = strategy._run
    run.keep_in(history.directory, history.ledger)
    history.write(run.ledger.state_dict())
    while (trial := search.next(history.outcomes, run.ledger.phases)) is not None:
        strategy = strategy.successor(noise_multiplier=trial.noise_multiplier, changed_settings="new_phase")
        score = fit(_run(trial, history.directory), strategy)
        setting = trial.setting
        history.outcomes.append(Outcome(trial.stage, trial.epsilon, setting.lr, setting.num_steps, score))
        history.write(run.ledger.state_dict())


def _run(trial: Trial, directory: Path) -> Run:
    """The run as a fit: its steps, and no validation on the way."""
    steps = trial.setting.num_steps
    settings = {"max_steps": steps, "max_epochs": -1, "check_val_every_n_epoch": steps + 1, "num_sanity_val_steps": 0}
    return Run({"lr": trial.setting.lr}, settings, FullBatches(), directory / FINAL if trial.is_final else None)


def search_for(
    strategy: DPStrategy,
    *,
    selection: PrivateSelection | None,
    small_epsilons: tuple[float, ...] | None,
    num_runs: tuple[int, ...],
    **search: Any,
) -> Search:
    """Return what a search within the budget of a strategy is.

    Args:
        strategy: A new one, with target and delta.
        selection: How scores are paid for; ``None`` for public validation data.
        small_epsilons: As for `SearchPlan.within`.
        num_runs: As for `SearchPlan.within`.
        **search: Other arguments of `Search`.

    Raises:
        PrivacyConfigurationError: If one of them does not go with a search.
    """
    target, delta = budget_of(strategy)
    score_mu = 0.0 if selection is None else 1 / selection.noise_multiplier
    plan = SearchPlan.within(target, delta, small_epsilons=small_epsilons, num_runs=num_runs, score_mu=score_mu)
    return Search(plan, selection=selection, **search)
