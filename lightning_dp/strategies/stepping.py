"""What a backward pass and an optimizer's step do, behind the hooks of the strategy.

Owns: `Stepping` and the ordinary case, automatic optimization. Manual optimization is in ``manual``; training steps
that are only tried are in ``trials``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_dp.bookkeeping import Keeping
from lightning_dp.errors import PrivacyError
from lightning_dp.mechanism import Mechanism
from lightning_dp.optimizers import tell_noise
from lightning_dp.private_step import PrivateStep


class Stepping(ABC):
    """Stands between Lightning's hooks and the private step."""

    is_trial = False
    """Whether nothing that happens has an effect, so that no hook of the user's is to be called."""

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each coordinate of the gradients that were released last."""
        return 0.0

    def begin_draw(self, step: int, mechanism: Mechanism) -> None:  # noqa: B027 - most have nothing to do
        """Begin a logical batch.

        Args:
            step: Which one of the run.
            mechanism: By which it was drawn and will be released.
        """

    def begin(self, num_real: int) -> None:  # noqa: B027
        """Begin a physical batch.

        Args:
            num_real: The number of its samples that were drawn; any further one is a phantom and adds nothing.
        """

    def running(self, data: Any) -> AbstractContextManager[None]:
        """Return the context of a training step on a physical batch."""
        return nullcontext()

    def end(self) -> None:  # noqa: B027
        """End a training step."""

    @abstractmethod
    def backward(self, loss: Tensor, run: Callable[[], None]) -> None:
        """Run a backward pass of the loss by ``run()``."""

    def paused(self) -> AbstractContextManager[None]:
        """Return the context of an optimizer's step: nothing in it is recorded."""
        return nullcontext()

    def recording(self) -> AbstractContextManager[None]:
        """Return the context, inside that one, of the closure of an optimizer's step."""
        return nullcontext()

    @abstractmethod
    def release(self, optimizer: Optimizer, result: Any) -> Any:
        """Write the gradients that an optimizer is to step by, after the closure and before any hook.

        Args:
            optimizer: Steps next.
            result: What the closure returned.

        Returns:
            What the optimizer and its caller may know of it.
        """


class Unprepared(Stepping):
    """Nothing was observed yet, so nothing can be released."""

    def backward(self, loss: Tensor, run: Callable[[], None]) -> None:
        """Raise."""
        raise _outside()

    def release(self, optimizer: Optimizer, result: Any) -> Any:
        """Raise."""
        raise _outside()


def _outside() -> PrivacyError:
    return PrivacyError(
        "a backward pass or an optimizer's step before the first training step: no gradient is private there. Call "
        "manual_backward() and optimizer.step() in training_step only."
    )


class AutomaticStepping(Stepping):
    """One loss for each physical batch, and one release for each logical batch.

    Args:
        keeping: Where per-sample gradients come from.
        step: Where clipped sums go.
        book: Books the release, by the number of its step.
    """

    def __init__(self, keeping: Keeping, step: PrivateStep, book: Callable[[int], None]) -> None:
        self._keeping, self._step, self._book = keeping, step, book
        self._num_real = self._at = 0

    @property
    def noise_std(self) -> float:
        """As the private step says."""
        return self._step.noise_std

    def begin_draw(self, step: int, mechanism: Mechanism) -> None:
        """Begin a logical batch.

        Raises:
            PrivacyError: If the one before was not released.
        """
        if self._step.num_pending:
            raise PrivacyError(
                "the batch before was trained on but never released: an override of optimizer_step skipped "
                "optimizer.step(closure). Call it for every batch; a skipped step would mix two draws of examples."
            )
        self._keeping.abandon()
        self._at = step
        self._step.begin(mechanism, step)

    def begin(self, num_real: int) -> None:
        """Begin a physical batch."""
        self._num_real = num_real

    def backward(self, loss: Tensor, run: Callable[[], None]) -> None:
        """Put the clipped gradients of the samples into the sums."""
        with self._keeping.recording():
            run()
        # Before the hook on_after_backward, which must not see a gradient without noise.
        book = self._keeping.close()
        self._step.collect(book, self._num_real)
        self._step.note_loss(loss, book.num_samples, self._num_real)

    def release(self, optimizer: Optimizer, result: Any) -> None:
        """Release the noisy gradient of the logical batch.

        The loss is not returned: an optimizer that steps by it would step by private data.

        Raises:
            PrivacyError: If there is nothing to release.
        """
        if not self._step.num_pending:
            raise PrivacyError(
                "optimizer.step() was called without a new training step: there is nothing to release. Call it once "
                "for every batch, with the closure that Lightning passes."
            )
        self._book(self._at)
        self._step.release()
        tell_noise(optimizer, self.noise_std)
