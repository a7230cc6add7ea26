"""`PublicPretraining`: DP continual pre-training, steps on public data before or beside private ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lightning_dp.callbacks.strategy import private_strategy
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.strategies.mixing import PLATEAU, Mixing, MixingSettings
from lightning_dp.strategies.public_steps import PublicData, PublicSteps

_log = logging.getLogger("lightning_dp")

_REFRESH = 1.0  # seconds between two values for the progress bar

PublicLoader = DataLoader[Any] | Callable[[], Any]


class PublicPretraining(pl.Callback):
    """Trains on public data first, until its loss stops improving, then on the private data (arXiv 2402.18752).

    Step t goes by ``alpha_t g_public + (1 - alpha_t) g_private``. ``g_public`` is the ordinary gradient of the module's
    own ``training_step`` on a batch of the public dataloader, neither clipped nor noised; ``g_private`` is the noisy
    one of any private fit. ``global_step``, ``max_steps``, epochs (as long as those of the private dataloader) and
    learning rate schedules count every step. When the public phase of ``mix="switch"`` ends, the first moment of Adam
    and its relatives (``exp_avg``) is set to zero; all else goes on, also the momentum of SGD.

    | ``mix`` | alpha_t before the switch | after it |
    |---|---|---|
    | ``"switch"`` | 1 | 0 |
    | ``"cosine"`` | (1 + cos(pi t / T)) / 2, T the number of steps before the switch | 0 |
    | ``"sample"`` | b / (b + B), b and B the public and the expected private batch size | 0 |

    Guarantee: steps with alpha_t = 1 draw, read and spend nothing of the private data, so the noise is calibrated for
    the others alone; with ``switch="plateau"`` when the switch comes, which public losses alone decide (after private
    steps, whose weights decide upon these, for all that may follow). Where alpha_t is below 1 a step spends as much as
    any private step. What the public data is made of is not protected at all: give
    only what may be known to everybody.

    Public batches must look like private ones. The public data is, in YAML too, what the datamodule or the module
    returns from ``public_dataloader()``, and held-out public data what it returns from ``public_val_dataloader()``, if
    they have these methods; or give them here.

    Args:
        public_dataloader: The public data: a dataloader, or a function that returns it.
        switch: ``"plateau"``: when the public loss has stopped to improve; or a fraction of all steps, above 0.
        mix: See above. ``"cosine"`` and ``"sample"`` need a fraction; 1.0 mixes to the end.
        patience: How many checks without an improvement make a plateau.
        min_delta: By how much the least loss so far must be undercut to be an improvement.
        check_every: Public steps between two checks; by default one pass over the public data. Without held-out data
            the mean public training loss since the last check is looked at.
        public_val_dataloader: Held-out public data, on which the loss of ``training_step`` in evaluation mode is looked
            at instead: a dataloader, or a function that returns it.

    Raises:
        PrivacyConfigurationError: If an argument is not of that kind, or when the fit starts: if there is no public
            data, if it has examples of the private data, or if the fit cannot be private.

    Example:
        >>> public, private = random_split(dataset, [0.1, 0.9])  # doctest: +SKIP
        >>> callback = PublicPretraining(DataLoader(public, batch_size=64, shuffle=True))  # doctest: +SKIP
    """

    def __init__(
        self,
        public_dataloader: PublicLoader | None = None,
        switch: float | str = "plateau",
        mix: str = "switch",
        *,
        patience: int = 3,
        min_delta: float = 0.0,
        check_every: int | None = None,
        public_val_dataloader: PublicLoader | None = None,
    ) -> None:
        super().__init__()
        self._given, self._given_val = public_dataloader, public_val_dataloader
        self._settings = MixingSettings(mix, switch, patience, min_delta, check_every)
        if public_val_dataloader is not None and switch != PLATEAU:
            raise PrivacyConfigurationError(
                f"public_val_dataloader with switch={switch!r}: held-out data is looked at for a plateau only. Use "
                "switch='plateau', or leave it out."
            )
        self._steps = self._new_steps()
        self._logged = (0.0, -1.0)

    def _new_steps(self) -> PublicSteps:
        return PublicSteps(Mixing(self._settings), self._data)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have the strategy make public steps."""
        if stage != "fit":
            return
        if trainer.global_step == 0:  # otherwise a further fit of the same run
            self._steps = self._new_steps()
        private_strategy(trainer, self).mix_public(self._steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how the run begins."""
        rank_zero_info(f"Public data: {self._steps.mixing.sentence}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the weight of the public gradient, if somebody is going to look."""
        (before, shown), weight, now = self._logged, self._steps.weight, time.monotonic()
        due = bool(trainer.loggers) and trainer._logger_connector.should_update_logs
        if due or batch_idx == 0 or (weight != shown and now - before >= _REFRESH) or weight == 0.0 != shown:
            pl_module.log("privacy/public_weight", weight, on_step=True, prog_bar=True, batch_size=1)
            self._logged = now, weight

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say if the private data was never used."""
        if self._steps.mixing.private_from is None:
            _log.warning(
                "PublicPretraining: the fit has ended within the public phase, and the private data was not used. Use "
                "a smaller patience, a larger min_delta, a fraction for switch, or more steps."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the phase and where the public data is, for the checkpoint."""
        return self._steps.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the phase of the checkpoint."""
        self._steps.load_state_dict(state_dict)

    def _data(self, trainer: pl.Trainer) -> PublicData:
        train = _found(trainer, self._given, "public_dataloader")
        if train is None:
            raise PrivacyConfigurationError(
                "PublicPretraining has no public data: expected PublicPretraining(public_dataloader=...), or a method "
                "public_dataloader() of the datamodule or the module that returns a dataloader."
            )
        return PublicData(train, _found(trainer, self._given_val, "public_val_dataloader"))


def _found(trainer: pl.Trainer, given: PublicLoader | None, name: str) -> Any:
    """Return the dataloader that was given, or that a hook of this name returns; ``None`` without one."""
    if given is not None:
        return given() if callable(given) else given
    for source in (trainer.datamodule, trainer.lightning_module):  # type: ignore[attr-defined]
        hook = getattr(source, name, None)
        if callable(hook):
            return hook()
    return None
