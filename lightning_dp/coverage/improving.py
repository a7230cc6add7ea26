"""What steps of a planned fit improve, by the public data that the fit has.

Owns: which examples are looked at, and for which batch sizes. Does not own: the estimates (``curvature``) or formulas
(``forecasting.improvement``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_dp.bookkeeping.interception import uncompiled
from lightning_dp.clipping import NormClipping
from lightning_dp.coverage.curvature import Examples, curvature
from lightning_dp.data import PoissonLoader, even_chunks
from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.forecasting import Forecast
from lightning_dp.forecasting.improvement import Improvement
from lightning_dp.strategies.preparing import Found
from lightning_dp.strategies.public_steps import PublicSteps
from lightning_dp.strategies.run import PrivateRun
from lightning_dp.strategies.trials import Trial, gradients_put_aside
from lightning_dp.strategies.undisturbed import evaluating, undisturbed

_MOST = 64
"""Public examples that are looked at, each by a backward pass of its own."""

_OTHERS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the planned batch size, where no other noise can be calibrated."""


def improvement_of(
    module: pl.LightningModule,
    run: PrivateRun,
    public: PublicSteps | None,
    found: Found,
    forecast: Forecast | None,
) -> Improvement:
    """Return what steps improve, at the present weights of a module.

    Args:
        module: The user's module.
        run: Gives batch size, clipping and noise.
        public: Has the public data.
        found: What the training step trains, and the trial that runs it.
        forecast: Gives other batch sizes with their noise; ``None`` without noise.

    Raises:
        PrivacyConfigurationError: If there is no public data that can be looked at, or the clipping has several
            factors.
        UnsupportedModelError: If the curvature cannot be found.
    """
    loader, clipping = _public_examples(run, public), run.schedule.base.clipping
    if not isinstance(clipping, NormClipping):
        raise PrivacyConfigurationError(
            f"improvement with clipping={clipping}: its terms are those of one factor for the whole gradient of an "
            "example. Use clipping='flat', 'automatic', 'psac' or 'adaptive' to compare batch sizes."
        )
    parameters = list(found.trained.values())
    with uncompiled(), undisturbed(module), evaluating(module), gradients_put_aside(module.parameters()):
        terms = curvature(parameters, _examples(found.trial, loader, run), clipping)
    base = run.schedule.base
    sensitivity, size = base.clipping.sensitivity, base.expected_batch_size
    options = [(o.batch_size, o.noise_multiplier) for o in (forecast.batches if forecast is not None else ())]
    options = options or [(size * factor, base.noise_multiplier) for factor in _OTHERS]
    return Improvement(
        curvature=terms,
        planned=terms.step(size, base.noise_std),
        steps=tuple(terms.step(b, noise * sensitivity) for b, noise in options if b is not None),
        best_batch_size=terms.best_batch_size(base.noise_std),
    )


def _public_examples(run: PrivateRun, public: PublicSteps | None) -> PoissonLoader:
    if public is None:
        raise PrivacyConfigurationError(
            "improvement without public data: the terms of the improvement are estimated on public examples, as an "
            "estimate on the training data would be on no budget. Add the callback PublicPretraining with public data."
        )
    loader = public.examples()
    if loader is None:
        raise PrivacyConfigurationError(
            "improvement with public data that has no index: expected a dataset with __getitem__ and __len__, and a "
            "batch_size, since single public examples are looked at."
        )
    assert run.loader is not None, "settled with the dataloader"
    if run.loader.units.examples_per_unit > 1:
        raise PrivacyConfigurationError(
            f"improvement with examples_per_user={run.loader.units.examples_per_unit}: whose the public examples are "
            "is not known, so the gradient of a user cannot be found. Leave improvement out."
        )
    return loader


def _examples(trial: Trial, loader: PoissonLoader, run: PrivateRun) -> Examples:
    """Return examples that are evenly spread over the public data."""
    total = loader.units.num_units
    count = min(_MOST, total)
    chosen = [k * total // count for k in range(count)]
    assert run.loader is not None, "settled with the dataloader"
    return Examples(
        loss=partial(_loss, trial),
        singles=[partial(loader.batch_of, [i]) for i in chosen],
        chunks=[
            (partial(loader.batch_of, part), len(part))
            for part in even_chunks(chosen, run.loader.max_physical_batch_size)
        ],
    )


def _loss(trial: Trial, batch: Any) -> Tensor:
    loss = trial.loss(batch)
    if loss is None:
        raise UnsupportedModelError(
            "the training step returned no loss for a public example, so there is nothing to improve. Return a loss "
            "for every batch, or leave improvement out."
        )
    return loss
