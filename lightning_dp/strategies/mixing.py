"""What the gradient of a step is made of: public data, private data, or both.

Owns: the weight of the public gradient in every step, and when the public phase ends. Does not own: batches
(``data.public``), gradients (``public_steps``), noise or budget. Knows nothing of Lightning.

DP continual pre-training (arXiv 2402.18752): step t goes by ``alpha_t g_public + (1 - alpha_t) g_private``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyConfigurationError

PLATEAU = "plateau"


@dataclass(frozen=True)
class MixingSettings:
    """The arguments of `PublicPretraining` that decide upon the weights; see there.

    Raises:
        PrivacyConfigurationError: If one is not what it should be, or two do not go together.
    """

    mix: str = "switch"
    switch: float | str = PLATEAU
    patience: int = 3
    min_delta: float = 0.0
    check_every: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.mix not in ("switch", "cosine", "sample"):
            raise PrivacyConfigurationError(f"mix={self.mix!r}: expected 'switch', 'cosine' or 'sample'.")
        self._check_switch()
        for name, value in (("patience", self.patience), ("check_every", self.check_every)):
            number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not number and not (name == "check_every" and value is None):
                raise PrivacyConfigurationError(f"{name}={value!r}: expected an integer of at least 1.")
        if not _is_number(self.min_delta) or self.min_delta < 0:
            raise PrivacyConfigurationError(f"min_delta={self.min_delta!r}: expected a number of at least 0.")

    def _check_switch(self) -> None:
        switch = self.switch
        if switch == PLATEAU:
            if self.mix == "switch":
                return
            raise PrivacyConfigurationError(
                f"switch='plateau' with mix={self.mix!r}: expected the fraction of the steps after which private "
                "gradients are alone, such as switch=1.0. Private data takes part before, and so would decide upon the "
                "end of the mixing."
            )
        most = "below 1" if self.mix == "switch" else "of at most 1"
        inside = _is_number(switch) and 0 < switch <= 1 and (switch < 1 or self.mix != "switch")  # type: ignore[operator]
        if not inside:
            raise PrivacyConfigurationError(
                f"switch={switch!r} with mix={self.mix!r}: expected "
                f"{chr(39) + PLATEAU + chr(39) + ' or ' if self.mix == 'switch' else ''}a fraction of the steps above "
                f"0 and {most}."
            )


class Plateau:
    """Judges when a loss has stopped to get smaller.

    Args:
        patience: How many checks in a row without an improvement are needed.
        min_delta: By how much the least loss so far must be undercut, to be an improvement. NaN is none.
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        self._patience, self._min_delta = patience, min_delta
        self.best, self.bad = math.inf, 0

    def note(self, loss: float) -> None:
        """Take a further loss into account."""
        improved = loss < self.best - self._min_delta
        self.best, self.bad = (loss, 0) if improved else (self.best, self.bad + 1)

    @property
    def is_reached(self) -> bool:
        """Whether the loss has stopped to improve."""
        return self.bad >= self._patience


class Mixing:
    """The weight of the public gradient in every step of a run.

    Guarantee: the end of a public phase depends on the number of steps and on losses of public data alone, both before
    the first private draw; so the noise may be calibrated when the phase ends, for the steps that are left then. After
    the first private draw no weight depends on any loss.

    Args:
        settings: The checked arguments.
    """

    def __init__(self, settings: MixingSettings) -> None:
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """Begin a run."""
        self.plateau = Plateau(self.settings.patience, self.settings.min_delta)
        self.private_from: int | None = None
        self._end: int | None = None
        self._share, self._window = 0.0, 1
        self._noted: list[Tensor] = []

    @property
    def is_settled(self) -> bool:
        """Whether it is known when private gradients begin."""
        return self.settings.switch != PLATEAU or self.private_from is not None

    @property
    def sentence(self) -> str:
        """What public data does in the run, once the number of steps is known."""
        if self.private_from is not None:
            return f"The public phase has ended before, after {self.private_from} steps."
        if self.settings.mix != "switch":
            return f"Public and private gradients are mixed (mix={self.settings.mix!r}) in the first {self._end} steps."
        if self._end is not None:
            return f"The first {self._end} steps are public; they spend nothing."
        return (
            "The first steps are public, until the public loss stops improving; they spend nothing. Calibrated noise "
            "is until then that of the most private steps there can be, and then that of those which are left."
        )

    def first_private(self, step: int, planned: int | None) -> int:
        """Return the number of the first step with a private gradient, from ``step`` on.

        As long as only a plateau can tell it is ``step`` itself: the most private steps that there can be.

        Args:
            step: The step that comes next.
            planned: How many steps are planned in all; ``None`` without a limit.

        Raises:
            PrivacyConfigurationError: If the fraction cannot be taken of so many steps.
        """
        switch, mix = self.settings.switch, self.settings.mix
        if not isinstance(switch, str):
            self._end = self._end_of(switch, planned)
        if self.private_from is not None:
            return max(step, self.private_from)
        if self._end is None or mix == "sample":
            return step
        return max(step, 1 if mix == "cosine" else self._end)

    def _end_of(self, switch: float, planned: int | None) -> int:
        if planned is None:
            raise PrivacyConfigurationError(
                f"switch={switch:g} is a fraction of the steps, and the trainer has no limit of steps: give the "
                "Trainer max_epochs or max_steps, or use switch='plateau'."
            )
        end = round(switch * planned)
        if end < 1 or (self.settings.mix == "switch" and end >= planned):
            raise PrivacyConfigurationError(
                f"switch={switch:g} of {planned} steps gives {end} public steps: expected at least one, and with "
                "mix='switch' at least one private step. Use another fraction, or more steps."
            )
        return end

    def set_batch_sizes(self, public: int | None, private: int, batches_of_a_pass: int) -> None:
        """Tell what follows from the sizes of batches.

        Args:
            public: The batch size of the public dataloader, if it has one.
            private: The expected batch size of the private one: that of a draw is private.
            batches_of_a_pass: After how many public steps a plateau is looked for, if the user did not say.

        Raises:
            PrivacyConfigurationError: If a size is needed that is not known.
        """
        self._window = self.settings.check_every or batches_of_a_pass
        if self.settings.mix != "sample":
            return
        if public is None:
            raise PrivacyConfigurationError(
                "mix='sample' weighs public and private gradients by their batch sizes, and the public dataloader has "
                "batch_size=None. Give it a batch_size, or use another mix."
            )
        self._share = public / (public + private)

    def weight(self, step: int) -> float:
        """Return alpha_t, the weight of the public gradient in a step.

        | mix | before the switch | after it |
        |---|---|---|
        | switch | 1 | 0 |
        | cosine | (1 + cos(pi t / T)) / 2, T the number of steps before the switch | 0 |
        | sample | b / (b + B), b and B the public and the expected private batch size | 0 |

        The last one is the mean over all examples of the step, if public gradients are means over b examples and
        private ones over B.
        """
        if self.settings.mix == "switch":
            return float(self._is_before_switch(step))
        assert self._end is not None, "a fraction, of a known number of steps"
        if step >= self._end:
            return 0.0
        return self._share if self.settings.mix == "sample" else 0.5 * (1 + math.cos(math.pi * step / self._end))

    def _is_before_switch(self, step: int) -> bool:
        if self.private_from is not None:
            return False
        return step < self._end if self._end is not None else not self.plateau.is_reached

    def begin_private(self, step: int) -> bool:
        """Note that the first private draw comes next; return whether that was not known."""
        if self.private_from is not None:
            return False
        self.private_from = step
        return True

    # ---- the plateau -------------------------------------------------------------------------------------------

    def note(self, loss: Tensor) -> None:
        """Note the loss of a public step."""
        if self.settings.switch == PLATEAU:
            self._noted.append(loss.detach())

    @property
    def is_due(self) -> bool:
        """Whether it is time to look for a plateau."""
        return self.settings.switch == PLATEAU and self.private_from is None and len(self._noted) >= self._window

    def judge(self, loss: float | None = None) -> None:
        """Look for a plateau.

        Args:
            loss: On held-out public data; by default the mean over the public steps since the last time.
        """
        self.plateau.note(fmean(map(float, self._noted)) if loss is None else loss)
        self._noted.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {
            "private_from": self.private_from,
            "best": self.plateau.best,
            "bad": self.plateau.bad,
            "noted": [float(loss) for loss in self._noted],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was."""
        self.private_from = state["private_from"]
        self.plateau.best, self.plateau.bad = state["best"], state["bad"]
        self._noted = [torch.tensor(loss, dtype=torch.float64) for loss in state["noted"]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
