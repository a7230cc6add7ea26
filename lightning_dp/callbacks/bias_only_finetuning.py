"""`BiasOnlyFinetuning`: DP-BiTFiT, training of the biases alone (arXiv 2210.00036).

Owns: when biases are added, and from when on the rest is frozen. Does not own: which parameters these are
(``selection``), how biases are added (``missing_biases``), what becomes of an optimizer (``restarting``), or anything
private: the strategy sees what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.utilities import rank_zero_info

from lightning_dp.callbacks.making import when_made
from lightning_dp.callbacks.restarting import check_proportional, rescale, restart
from lightning_dp.callbacks.selection import Selection
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.missing_biases import add_missing_biases, check_initialised

_AVERAGING = tuple(
    getattr(callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")
    if hasattr(callbacks, name)  # the second came with Lightning 2.6
)


class BiasOnlyFinetuning(pl.Callback):
    """Freezes all parameters but the biases, and those that ``unfreeze`` names, before the optimizer is made or later.

    A bias needs no layer input for its gradient, so private training of biases costs what ordinary training of them
    costs. The optimizer should be made of the parameters that require a gradient, or of all: frozen ones are left
    alone.

    With ``after_epoch`` everything is trained first, and the biases from that epoch on ("X + BiTFiT"). It is one run
    with one noise, one sample rate and one budget, calibrated for all its steps. At the switch the optimizer goes on as
    if it were made anew for what is left: its state (momenta of gradients that were clipped together with those of the
    weights, of another size) is cleared, its settings stay. Its schedulers go on from where they are, since most are
    made for all steps of a run. Resumes before, at and after the switch go on in the right phase.

    With ``add_missing`` the weights that are saved have parameters that the module does not have by itself. They are
    those of the same layers with ``bias=True``; see `add_missing_biases` for modules that cannot be made so.

    Args:
        unfreeze: Which parameters are trained as well, typically a new head: parts of dotted names (``"head"`` is
            ``head.weight`` and ``model.head.weight``) or patterns (``"*.norm*.weight"``).
        add_missing: Whether linear, convolution and normalisation layers and attention get zero biases where they have
            none, when the module is set up, in every stage. Layers that would not use one are named in the log.
        after_epoch: How many epochs are trained in full before. 0: none.
        learning_rate_factor: By how much the learning rates are multiplied at the switch; biases want about ten times
            the rate of full training. A factor, and not a rate, as it also fits groups of several rates and schedules.

    Raises:
        PrivacyConfigurationError: If an argument is out of range; at the start of the fit, if there is no bias, if a
            name in ``unfreeze`` fits nothing, if all weights are frozen already with ``after_epoch``, or if a
            scheduler has learning rates that a factor leaves unclear.
    """

    def __init__(
        self,
        unfreeze: Sequence[str] = (),
        add_missing: bool = False,
        after_epoch: int = 0,
        learning_rate_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self._selection = Selection(unfreeze)
        self.add_missing, self.after_epoch, self.learning_rate_factor = add_missing, after_epoch, learning_rate_factor
        self._switched = False
        _check_arguments(after_epoch, learning_rate_factor)

    def at_once(self) -> BiasOnlyFinetuning:
        """Return one that trains the same from the first epoch on."""
        return BiasOnlyFinetuning(self._selection.unfreeze, self.add_missing) if self.after_epoch else self

    # ---- before the optimizer is made, and before a checkpoint is loaded ----------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Add biases and freeze, at once or when the module has made its layers."""
        if not self.add_missing and stage != "fit":
            return
        self._check_averaging(trainer)
        when_made(pl_module, partial(self._begin, trainer, pl_module, stage))

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_initialised(pl_module)
        if self.add_missing:
            self._add(pl_module)
        if stage != "fit":
            return
        self._selection.check(pl_module)
        self._switched = 0 < self.after_epoch <= trainer.current_epoch  # another fit of the same trainer
        if not self.after_epoch:
            self._selection.freeze_others(pl_module)
            rank_zero_info(f"Bias-only: {self._selection.share(pl_module)}.")

    @staticmethod
    def _add(pl_module: pl.LightningModule) -> None:
        found = add_missing_biases(pl_module)
        if found.added:
            layers = "1 layer" if len(found.added) == 1 else f"{len(found.added)} layers"
            rank_zero_info(f"Bias-only: zero biases were added to {layers} that had none.")
        if found.left_out:
            others = len(found.left_out) - 5
            rank_zero_info(
                f"Bias-only: no bias was added to {', '.join(found.left_out[:5])}"
                f"{f' and {others} others' if others > 0 else ''}, which would not use it."
            )

    # ---- once the optimizer is made: two phases -----------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on in the second phase, or announce it.

        A checkpoint's optimizers are loaded next: those of the second phase have fewer parameters.
        """
        if self._switched:
            self._switch(trainer, pl_module)
        elif self.after_epoch:
            self._check_first_phase(trainer, pl_module)
            rank_zero_info(f"Bias-only from epoch {self.after_epoch} on: {self._selection.share(pl_module)}.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the second phase of a resumed fit, if Lightning does not begin its first epoch.

        So it is after a checkpoint that was saved in the last batch of an epoch.
        """
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the second phase."""
        if not self._switched and 0 < self.after_epoch <= trainer.current_epoch:
            self._switch(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return whether the second phase has begun, and with which parameters."""
        return {"switched": self._switched, "unfreeze": list(self._selection.unfreeze)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the phase of a checkpoint.

        Raises:
            PrivacyConfigurationError: If the second phase was begun with other parameters.
        """
        self._switched = state_dict["switched"]
        before = tuple(state_dict["unfreeze"])
        if self._switched and before != self._selection.unfreeze:
            raise PrivacyConfigurationError(
                f"BiasOnlyFinetuning(unfreeze={list(self._selection.unfreeze)}): it was {list(before)} when the second "
                "phase of the checkpoint began, and its optimizer has the state of these parameters. Keep it, or go on "
                "from a checkpoint of the first phase."
            )

    def _switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_schedulers(trainer)
        self._selection.freeze_others(pl_module)
        for optimizer in trainer.optimizers:
            restart(optimizer, self.learning_rate_factor)
        for config in trainer.lr_scheduler_configs:
            rescale(config.scheduler, self.learning_rate_factor)
        self._switched = True
        rank_zero_info(f"Bias-only from now on: {self._selection.share(pl_module)}.")

    # ---- what is refused ----------------------------------------------------------------------------------------

    def _check_averaging(self, trainer: pl.Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if self.add_missing and isinstance(callback, _AVERAGING):
                raise PrivacyConfigurationError(
                    f"BiasOnlyFinetuning(add_missing=True) with {type(callback).__name__}, which may copy the module "
                    "before the biases are there. Leave add_missing out, and call "
                    "lightning_dp.add_missing_biases(module) before the fit."
                )

    def _check_first_phase(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_schedulers(trainer)
        self._selection.check_others_are_trained(pl_module)

    def _check_schedulers(self, trainer: pl.Trainer) -> None:
        if self.learning_rate_factor != 1:
            for config in trainer.lr_scheduler_configs:
                check_proportional(config.scheduler, self.learning_rate_factor)


def _check_arguments(after_epoch: int, learning_rate_factor: float) -> None:
    if not isinstance(after_epoch, int) or isinstance(after_epoch, bool) or after_epoch < 0:
        raise PrivacyConfigurationError(f"after_epoch={after_epoch!r}: expected a number of epochs, at least 0.")
    number = isinstance(learning_rate_factor, int | float) and not isinstance(learning_rate_factor, bool)
    if not number or not 0 < learning_rate_factor < math.inf:
        raise PrivacyConfigurationError(f"learning_rate_factor={learning_rate_factor!r}: expected a positive number.")
    if learning_rate_factor != 1 and not after_epoch:
        raise PrivacyConfigurationError(
            f"learning_rate_factor={learning_rate_factor:g} with after_epoch=0: there is no phase before, whose "
            "learning rate it would multiply. Set the rate in the optimizer, or give after_epoch."
        )
