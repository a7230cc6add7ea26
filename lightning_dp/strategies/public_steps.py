"""Steps on public data, beside or instead of private ones.

Owns: public gradients, and what happens when the public phase ends. Does not own: when that is (``mixing``), the
batches (``data.public``), or anything private: a private gradient is made as in any other run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_dp.bookkeeping import BookKeeping
from lightning_dp.data import ExampleUnits, MixedLoader, PoissonLoader, PublicStream, check_public
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.noise import SecretRandom
from lightning_dp.optimizers import tell_noise
from lightning_dp.processes import Processes
from lightning_dp.strategies import checks
from lightning_dp.strategies.mixing import PLATEAU, Mixing
from lightning_dp.strategies.planning import next_step
from lightning_dp.strategies.preparing import find
from lightning_dp.strategies.run import PrivateRun
from lightning_dp.strategies.stepping import Stepping
from lightning_dp.strategies.trials import gradients_put_aside
from lightning_dp.strategies.undisturbed import evaluating, undisturbed

_FIRST_MOMENT = "exp_avg"
"""What every optimizer of Adam's family calls its mean of gradients, in torch and elsewhere."""


class PublicStepping(Stepping):
    """Backward passes of public data are ordinary ones; nothing is booked, clipped or noised.

    Args:
        done: Called when the optimizer has its gradients, before it steps by them.
    """

    def __init__(self, done: Callable[[], object] = lambda: None) -> None:
        self._done = done

    def backward(self, loss: Tensor, run: Callable[[], None]) -> None:
        """Let autograd write gradients."""
        run()

    def release(self, optimizer: Optimizer, result: Any) -> Any:
        """Change nothing: the gradients, and the loss, are those of public data, without noise."""
        tell_noise(optimizer, 0.0)
        self._done()
        return result


@dataclass(frozen=True)
class PublicData:
    """The user's public dataloaders, not checked yet.

    Args:
        train: Gives the batches of public steps.
        held_out: Gives batches on which a plateau is looked for; ``None``: the training loss tells.
    """

    train: Any
    held_out: Any = None


class PublicSteps:
    """The public part of a fit.

    Guarantee: what it computes sees no batch but those of the public dataloaders; what it does to a private step comes
    after the noisy gradient was released.

    On several processes each has batches of its own, and their gradients are averaged, as in ordinary data-parallel
    training.

    Args:
        mixing: The weights.
        data: Returns the dataloaders of a fit.
    """

    def __init__(self, mixing: Mixing, data: Callable[[pl.Trainer], PublicData]) -> None:
        self.mixing, self._data = mixing, data
        self._processes = Processes()
        self._stream: PublicStream | None = None
        self._resumed: dict[str, Any] | None = None
        self._loader: MixedLoader | None = None
        self._train: DataLoader[Any] | None = None
        self._held_out: DataLoader[Any] | None = None
        self._run_step: Callable[[Any], Any] | None = None
        self._beside: dict[int, Tensor] | None = None
        self._checked = False

    # ---- batches -----------------------------------------------------------------------------------------------

    def loader(self, trainer: pl.Trainer, run: PrivateRun, before_private: Callable[[], None]) -> MixedLoader:
        """Return the loader that Lightning is to iterate.

        Args:
            trainer: Counts the steps.
            run: Its loader draws from the private data.
            before_private: Called before a private draw, first of all in each epoch that has one.

        Raises:
            PrivacyConfigurationError: If the public data cannot be used so.
        """
        assert run.loader is not None, "settled with the dataloader"
        _check_trained(trainer.lightning_module, run)
        self._processes = run.processes
        data = self._data(trainer)
        self._train = check_public(data.train, run.loader.dataset)
        self._held_out = None if data.held_out is None else check_public(data.held_out, run.loader.dataset)
        if self._stream is None:  # a reloaded private dataloader begins no new stream
            self._stream = PublicStream(self._train, self._processes)
            if self._resumed is not None:
                self._stream.load_state_dict(self._resumed)
        check_public(self._stream.loader, run.loader.dataset)  # it goes on, whatever was returned now
        a_pass = len(run.loader) if isinstance(self._train.dataset, IterableDataset) else self._stream.num_batches
        self.mixing.set_batch_sizes(self._train.batch_size, run.batch_size, a_pass)

        def weight() -> float:
            self._judge(trainer.lightning_module)
            return self.mixing.weight(next_step(trainer))

        self._loader = MixedLoader(run.loader, self._stream, weight=weight, before_private=before_private)
        return self._loader

    def examples(self) -> PoissonLoader | None:
        """Return what gives single public examples, by the user's ``collate_fn``; ``None`` if they have no index.

        Nothing is ever drawn from it.
        """
        train = self._train
        if train is None or isinstance(train.dataset, IterableDataset) or train.batch_size is None:
            return None
        return PoissonLoader(
            train,
            ExampleUnits(len(train.dataset)),  # type: ignore[arg-type]
            sample_rate=lambda step: 1.0,
            first_step=lambda: 0,
            num_batches=0,
            max_physical_batch_size=1,
            random=SecretRandom(),
        )

    @property
    def weight(self) -> float:
        """The weight of the public gradient in the last step."""
        return 0.0 if self._loader is None else self._loader.delivered.weight

    @property
    def is_alone(self) -> bool:
        """Whether the batch that was delivered last is public."""
        return self._loader is not None and self._loader.delivered.is_public

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {**self.mixing.state_dict(), "stream": self._stream.state_dict() if self._stream else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was."""
        self._resumed = state["stream"]
        self.mixing.load_state_dict(state)

    # ---- before the first step ---------------------------------------------------------------------------------

    def look(
        self,
        module: pl.LightningModule,
        run: PrivateRun,
        run_step: Callable[[Any], Any],
        put: Callable[[Stepping], Stepping],
    ) -> None:
        """Look at the training step on public examples: what private steps would refuse is not to be refused too late.

        Private examples are looked at before the first private step, as in any other run.

        Args:
            module: The user's module.
            run: Gives the settings.
            run_step: Transfers a batch and runs the training step on it.
            put: Puts a `Stepping` behind the hooks of the strategy, and returns the one that was there.

        Raises:
            PrivacyError: If it cannot be trained privately.
        """
        assert run.loader is not None, "settled with the dataloader"
        self._run_step, self._checked = run_step, not run.settings.self_check
        begins, examples = self.mixing.weight(next_step(module.trainer)) == 1, self.examples()
        alone = run.loader.units.examples_per_unit == 1  # examples of one user may influence each other
        if begins and examples is not None and alone and run.settings.clipping_engine == "book":
            found = find(module, run, run_step, put, examples)
            keeping = BookKeeping(found.trained, found.others)
            found.observer.observe(keeping, found.trained, check=run.settings.self_check)

    # ---- the public phase --------------------------------------------------------------------------------------

    def note(self, output: Any) -> None:
        """Note what the training step returned for a public batch."""
        loss = checks.loss_of(output)
        if self.mixing.is_settled:
            return
        noted = [each for each in self._processes.gather(loss if loss is None else loss.detach()) if each is not None]
        if noted:
            self.mixing.note(torch.stack(noted).mean())

    def average(self, module: pl.LightningModule) -> None:
        """Average the public gradients over all processes."""
        self._processes.average_gradients(module.parameters())

    def _judge(self, module: pl.LightningModule) -> None:
        if self.mixing.is_due:
            self.mixing.judge(None if self._held_out is None else self._held_out_loss(module, self._held_out))

    def _held_out_loss(self, module: pl.LightningModule, loader: DataLoader[Any]) -> float:
        """Return the mean loss of held-out public batches."""
        run_step = self._run_step
        assert run_step is not None, "known when training starts"
        with undisturbed(module), evaluating(module), torch.no_grad():
            losses = [checks.loss_of(run_step(batch)) for batch in loader]
        own = fmean(float(loss) for loss in losses if loss is not None)
        return self._processes.broadcast(own)  # all judge alike

    def begin_private(self, trainer: pl.Trainer, run: PrivateRun) -> None:
        """End the public phase, once: settle the noise if it could not be before, and forget the first moments."""
        step = next_step(trainer)
        if not self.mixing.begin_private(step):
            return
        for parameter in trainer.lightning_module.parameters():
            parameter.grad = None  # of public data: not an escape from the book
        if self.mixing.settings.mix != "switch":
            return
        reset = reset_first_moments(trainer.optimizers)
        rank_zero_info(
            f"Privacy: the public phase ends after {step} steps{self._reason}, and private steps begin. "
            f"{'The first moment of the optimizer is reset.' if reset else 'The optimizer keeps its state.'}"
        )
        # After releases the plateau may follow from them, and so would noise that is calibrated by when it comes.
        if self.mixing.settings.switch == PLATEAU and not run.ledger.num_releases:
            run.settle(trainer, trainer.world_size)

    @property
    def _reason(self) -> str:
        if self.mixing.settings.switch != PLATEAU:
            return ""
        return f", as the public loss has not improved in {self.mixing.settings.patience} checks"

    # ---- public and private gradients in one step ----------------------------------------------------------------

    def run_beside(self, module: pl.LightningModule, run: Callable[[Any], None], check: Callable[[Any], None]) -> None:
        """Keep the public gradient of a step that has a private one, too.

        Args:
            module: The user's module.
            run: Runs the training step on a batch, forward and backward.
            check: Looks at a public batch, once in a fit.

        Raises:
            PrivacyError: If the check does.
        """
        assert self._loader is not None, "it delivered the batch"
        self._beside, delivered = None, self._loader.delivered
        if delivered.weight == 0:
            return
        if not self._checked:
            check(delivered.public)
            self._checked = True
        with gradients_put_aside(module.parameters()):
            run(delivered.public)
            self.average(module)
            self._beside = {id(p): p.grad for p in module.parameters() if p.grad is not None}

    def blend(self, optimizer: Optimizer, noise_std: float) -> None:
        """Mix the public gradient into the released ones.

        Args:
            optimizer: Steps next.
            noise_std: Standard deviation of the noise in the released gradients.
        """
        if self._beside is None:
            return
        beside, weight = self._beside, self.weight
        self._beside = None
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is None:
                continue
            p.grad.mul_(1 - weight)
            if id(p) in beside:
                p.grad.add_(beside[id(p)], alpha=weight)
        tell_noise(optimizer, (1 - weight) * noise_std)


def reset_first_moments(optimizers: Iterable[Optimizer]) -> bool:
    """Set the first moments of Adam's family to zero, and nothing else; return whether there were any.

    Second moments, counts of steps and the momentum of SGD stay, as in arXiv 2402.18752.
    """
    found = False
    for optimizer in optimizers:
        for state in optimizer.state.values():
            moment = state.get(_FIRST_MOMENT)
            if isinstance(moment, Tensor):
                moment.zero_()
                found = True
    return found


def _check_trained(module: pl.LightningModule, run: PrivateRun) -> None:
    if not module.automatic_optimization:
        raise PrivacyConfigurationError(
            "PublicPretraining with automatic_optimization=False: which of its optimizers a training step calls with "
            "public gradients is not known. Use automatic optimization, or make the public steps in a fit of their own."
        )
    if run.settings.loss_reduction != "mean":
        raise PrivacyConfigurationError(
            f"PublicPretraining with loss_reduction={run.settings.loss_reduction!r}: public gradients would be sums "
            "beside private means. Return the mean loss from training_step, with loss_reduction='mean'."
        )
