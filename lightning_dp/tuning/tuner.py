"""`tune` and `random_search`: private searches from Python.

Owns: their arguments. Does not own: the searches (``searching``, ``random_search``) or their runs (``fits``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_dp.accounting import Repetitions
from lightning_dp.strategies import DPStrategy
from lightning_dp.tuning.candidates import RandomSearch
from lightning_dp.tuning.fits import PythonRuns, budget_of
from lightning_dp.tuning.random_search import RandomSearchResult, run_random_search
from lightning_dp.tuning.scaling import SearchSpace
from lightning_dp.tuning.scores import PrivateSelection, Scores, resolve_selection
from lightning_dp.tuning.searching import TuningResult, run_search, search_for


def tune(
    make_module: Callable[[float], pl.LightningModule],
    train_dataloader: object,
    val_dataloader: object,
    *,
    strategy: DPStrategy,
    selection: str | PrivateSelection,
    monitor: str = "val_accuracy",
    mode: str = "max",
    space: SearchSpace | None = None,
    small_epsilons: tuple[float, ...] | None = None,
    num_runs: tuple[int, ...] = (3, 3),
    seed: int = 0,
    directory: str | os.PathLike[str] = "tuning",
    trainer: Mapping[str, Any] | None = None,
) -> TuningResult:
    """Find learning rate and steps by linear scaling, and train with them, all within one budget (arXiv 2212.04486).

    A few runs at small epsilons try random settings; the best product of learning rate and steps at each of them gives
    a line, and the line the setting of the final run, which has the rest of the budget. Full batches only.

    Guarantee: all runs together, interrupted ones included, spend at most ``target_epsilon`` of the strategy, and that
    covers the choice. Not covered: validation data that is said to be public.

    Args:
        make_module: Makes a module that is not trained yet, of a learning rate.
        train_dataloader: A `DataLoader` with ``batch_size=len(dataset)``, such as ``FrozenFeatures(...).dataloader()``.
        val_dataloader: Data that the best run is chosen by.
        strategy: A new one, with ``target_epsilon`` and ``target_delta`` for all runs together.
        selection: ``"public"`` says that the validation data is; a `PrivateSelection`, that its scores are paid for.
        monitor: What ``validation_step`` logs and is to choose.
        mode: ``"max"`` or ``"min"``.
        space: Where settings are tried.
        small_epsilons: What one run of each stage before the final one has, rising, in nats. Default: 5 % and 20 % of
            the target.
        num_runs: How many runs each of these stages has; more than about ten need smaller ``small_epsilons``.
        seed: Of the settings that are tried. It says nothing about noise and sampling, which are always secret.
        directory: Of this search alone; a search that was interrupted goes on there, and what it has spent counts.
        trainer: Further arguments of every ``Trainer``.

    Raises:
        PrivacyConfigurationError: If the arguments do not go together, or the directory belongs to another search.
        PrivacyBudgetExceeded: If interrupted runs have left too little for the final one.

    Example:
        >>> result = tune(  # doctest: +SKIP
        ...     lambda lr: LinearHead(768, 10, lr=lr), train.dataloader(), public.dataloader(), selection="public",
        ...     strategy=DPStrategy(target_epsilon=1.0, target_delta=1e-5),
        ... )
        >>> result.print()  # doctest: +SKIP
    """
    paid = resolve_selection(selection)
    search = search_for(
        strategy,
        selection=paid,
        small_epsilons=small_epsilons,
        num_runs=num_runs,
        space=space or SearchSpace(),
        monitor=monitor,
        mode=mode,
        seed=seed,
    )
    scores = Scores(monitor, paid)
    fit = PythonRuns(lambda values: make_module(values["lr"]), train_dataloader, val_dataloader, scores, trainer)
    return run_search(search, strategy, Path(directory), fit)


def random_search(
    make_module: Callable[..., pl.LightningModule],
    train_dataloader: object,
    val_dataloader: object,
    *,
    strategy: DPStrategy,
    selection: str | PrivateSelection,
    space: Mapping[str, tuple[float, float]],
    repetitions: Repetitions | None = None,
    monitor: str = "val_accuracy",
    mode: str = "max",
    directory: str | os.PathLike[str] = "random_search",
    trainer: Mapping[str, Any] | None = None,
) -> RandomSearchResult:
    """Train a random number of times with random hyper-parameters, and release the best (arXiv 1811.07971, 2110.03620).

    Epsilon of the whole search is about twice that of one run where 10 are expected, and noise is calibrated so that it
    is within ``target_epsilon``. Batches may be sampled; noise, sample rate and steps are the same in every run.

    Guarantee: whoever sees the result, and nothing else, has seen an output that is ``target_epsilon``-private at
    ``target_delta``; that covers the choice. It does NOT hold for whoever learns anything else: the number of runs, how
    long the search took, or logs, scores and weights of the other runs. The directory is private until the search has
    ended; then it holds nothing of them. The number of runs is drawn by this function and must not be chosen, nor a
    search begun again because of what was seen of it. Not covered: validation data that is said to be public.

    Args:
        make_module: Makes a module that is not trained yet, of the hyper-parameters, given by name.
        train_dataloader: As for an ordinary fit; ``batch_size`` is the expected size of a logical batch.
        val_dataloader: Data that the best run is chosen by.
        strategy: A new one, with ``target_epsilon`` and ``target_delta`` for the whole search.
        selection: ``"public"`` says that the validation data is; a `PrivateSelection`, that its scores are paid for.
        space: The least and the largest value of every hyper-parameter; their logarithms are uniform. None of them may
            change noise, batch size or steps.
        repetitions: The distribution of the number of runs. Default: geometric, 10 expected.
        monitor: What ``validation_step`` logs and is to choose.
        mode: ``"max"`` or ``"min"``.
        directory: Of this search alone; a search that was interrupted goes on there.
        trainer: Further arguments of every ``Trainer``, such as ``max_epochs``.

    Raises:
        PrivacyConfigurationError: If the arguments do not go together, the directory belongs to another search, or a
            run would have another mechanism.
        PrivacyError: If no run has a score.

    Example:
        >>> result = random_search(  # doctest: +SKIP
        ...     lambda lr: MyModule(lr=lr), train_dataloader, public_dataloader, selection="public",
        ...     strategy=DPStrategy(target_epsilon=3.0, target_delta=1e-5), space={"lr": (0.01, 1.0)},
        ...     trainer={"max_epochs": 10},
        ... )
        >>> result.print()  # doctest: +SKIP
    """
    paid = resolve_selection(selection)
    search = RandomSearch(*budget_of(strategy), repetitions or Repetitions(), space, monitor, mode, paid)
    scores = Scores(monitor, paid)
    fit = PythonRuns(lambda values: make_module(**values), train_dataloader, val_dataloader, scores, trainer)
    return run_random_search(search, strategy, Path(directory), fit)
