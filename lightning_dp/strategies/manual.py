"""Manual optimization: a training step that runs its backward passes and steps its optimizers itself.

The unit is one optimizer's step: it releases the gradients that came back to its own parameters since they were zeroed.
Optimizers whose gradients do not depend on the training data, such as that of a generator, step without noise.

Owns: which gradients a step releases. Does not own: clipping and noise (``private_step``), or the finding out which
optimizers are private (``trials``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dp.bookkeeping import Book, BookKeeping
from lightning_dp.errors import PrivacyError, UnsupportedModelError
from lightning_dp.mechanism import Mechanism
from lightning_dp.optimizers import tell_noise
from lightning_dp.private_step import PrivateStep
from lightning_dp.strategies.following import Following
from lightning_dp.strategies.stepping import Stepping

Groups = Mapping[Optimizer, Mapping[str, nn.Parameter]]
"""The trained parameters of every private optimizer, by name."""


class PendingGradients:
    """What came back to the private parameters and was not released yet.

    Their ``.grad`` is a tensor of zeros meanwhile: user code that zeroes gradients, by whatever call, takes it away,
    and user code that acts on gradients without noise finds nothing to act on.

    Args:
        keeping: The book of the training step that runs.
        groups: The private optimizers.
        in_trial: Whether writes have to be found by contents: torch counts them for some operators only while a
            dispatch mode looks on. Placeholders are then ones.
    """

    def __init__(self, keeping: BookKeeping, groups: Groups, *, in_trial: bool = False) -> None:
        self._keeping, self._groups, self._in_trial = keeping, groups, in_trial
        self._parameters = {name: p for group in groups.values() for name, p in group.items()}
        self._held: dict[str, Tensor] = {}
        self._stale: set[str] = set()

    def begin(self) -> None:
        """Begin a training step; gradients of an earlier one that were neither released nor zeroed are stale."""
        self._stale |= self._held.keys()
        self._held.clear()

    def backward(self, run: Callable[[], None]) -> None:
        """Run a backward pass, and note for which parameters gradients came back."""
        with self._keeping.paused():
            self._forget_zeroed()
            before = {name: p.grad for name, p in self._parameters.items()}
            for p in self._parameters.values():
                p.grad = None
            with self._keeping.recording():
                run()
            self._note(before)

    def _note(self, before: Mapping[str, Tensor | None]) -> None:
        filed = self._keeping.filed()
        for name, p in self._parameters.items():
            if p.grad is not None:
                p.grad = None
                raise self._keeping.escape_of(name)
            p.grad = before[name]
            if name in filed and p.grad is None:
                p.grad = self._held[name] = torch.full_like(p, float(self._in_trial))
            elif name in filed and name not in self._held:
                self._stale.add(name)

    def take(self, optimizer: Optimizer) -> Book:
        """Return the gradients of an optimizer's parameters, which are pending no more.

        Raises:
            PrivacyError: If some of them belong to an earlier batch or step.
        """
        self._forget_zeroed()
        for name in self._groups[optimizer]:
            if name in self._stale:
                raise PrivacyError(
                    f"the gradient of '{name}' was not zeroed before the backward pass: what is left of an earlier "
                    "step or batch cannot be released again. Call optimizer.zero_grad() after every step; to use more "
                    "samples in a step, give the dataloader a larger batch_size."
                )
            self._held.pop(name, None)
        return self._keeping.take(self._groups[optimizer])

    def _forget_zeroed(self) -> None:
        for name, p in self._parameters.items():
            held = self._held.get(name)
            if held is not None and p.grad is held and self._was_written(held):
                raise UnsupportedModelError(
                    f"the gradient of '{name}' was written to between the backward pass and the optimizer's step, "
                    "where it has no noise yet. Zero gradients by zero_grad(set_to_none=True), and clip or change "
                    "them in on_before_optimizer_step, which sees the released ones."
                )
            if p.grad is None and (held is not None or name in self._stale):
                self._keeping.take([name])
                self._held.pop(name, None)
                self._stale.discard(name)

    def _was_written(self, held: Tensor) -> bool:
        return held._version > 0 or (self._in_trial and not bool((held == 1).all()))


class ManualStepping(Stepping):
    """Every step of a private optimizer is a release; those of the others are what they always are.

    Guarantee: a parameter of a private optimizer only ever changes by clipped and noised sums, of which one logical
    batch gives no more than ``releases_per_draw``, the number that is accounted for each draw. A public optimizer only
    steps by gradients in whose computation no sample took part, by any of torch's operators.

    Args:
        keeping: Where per-sample gradients come from.
        step: Where clipped sums go.
        book: Books what is released from one draw, by the number of its step.
        groups: The private optimizers.
        releases_per_draw: The most releases from one logical batch.
        public: The parameters of every optimizer that steps without noise, by name.
    """

    def __init__(
        self,
        keeping: BookKeeping,
        step: PrivateStep,
        book: Callable[[int], None],
        groups: Groups,
        releases_per_draw: int,
        public: Groups,
    ) -> None:
        self._keeping, self._step, self._book = keeping, step, book
        self._groups, self._releases_per_draw = groups, releases_per_draw
        self._pending = PendingGradients(keeping, groups)
        self._names = {id(p): name for group in public.values() for name, p in group.items()}
        self._following = Following()
        self._num_real = self._released = self._at = 0
        self._in_training_step = False

    def begin_draw(self, step: int, mechanism: Mechanism) -> None:
        """Begin a logical batch."""
        self._released, self._at = 0, step
        self._step.drop()
        self._step.begin(mechanism, step)
        self._pending.begin()

    def begin(self, num_real: int) -> None:
        """Begin a physical batch: under manual optimization it is the logical batch."""
        self._num_real, self._in_training_step = num_real, True

    def running(self, data: Any) -> AbstractContextManager[None]:
        """Follow the samples, where something could step by them without noise."""
        if not self._names:
            return nullcontext()
        self._following.mark(data)
        return self._following

    def end(self) -> None:
        """End the training step; what came back and was not released is forgotten."""
        self._keeping.abandon()
        self._in_training_step = False

    def backward(self, loss: Tensor, run: Callable[[], None]) -> None:
        """Run a backward pass; what comes back stays in the book until an optimizer steps."""
        self._pending.backward(run)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the optimizer see ordinary parameters."""
        with self._keeping.paused(), self._following.paused():
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record a closure, which may hold the forward and the backward pass."""
        with ExitStack() as stack:
            if self._in_training_step:
                stack.enter_context(self._keeping.recording())
                stack.enter_context(self._following.resumed())
            yield

    def release(self, optimizer: Optimizer, result: Any) -> Any:
        """Release the gradients of a private optimizer; those of a public one are what they are.

        Raises:
            PrivacyError: If more would be released from one draw than is accounted for, or if the gradients of a public
                optimizer depend on samples by now.
        """
        if not self._in_training_step:
            raise PrivacyError(
                f"an optimizer ({type(optimizer).__name__}) stepped outside training_step, where no samples are drawn "
                "and nothing is seen of what its gradients are made of: step it in training_step."
            )
        if optimizer not in self._groups:
            self._check_public(optimizer)
            tell_noise(optimizer, 0.0)
            return result
        book = self._pending.take(optimizer)
        if self._released == self._releases_per_draw:
            raise PrivacyError(
                f"a step of a private optimizer would be release number {self._released + 1} from one draw of samples; "
                f"{self._releases_per_draw} were made when the training step was observed, and are accounted for. Let "
                "the first training step of the fit step every optimizer as often as any later one."
            )
        if not self._released:
            self._book(self._at)
        self._released += 1
        self._step.collect(book, self._num_real)
        self._step.release(self._groups[optimizer])
        tell_noise(optimizer, self._step.noise_std)
        return None

    def _check_public(self, optimizer: Optimizer) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None and self._following.depends(p.grad):
                name = self._names.get(id(p), "of a parameter that was added")
                raise PrivacyError(
                    f"the gradient of '{name}' depends on the training data now. When the training step was observed "
                    f"it did not, so its optimizer ({type(optimizer).__name__}) steps without noise. Let the samples "
                    "take part in the first training step of the fit as in any later one, if only with weight zero: "
                    "then it is trained privately. Or keep them out of its loss (detach, zero_grad)."
                )
