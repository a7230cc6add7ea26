"""`DPStrategy`: one device, or several by ordinary data parallelism.

Owns: what Lightning must not do: make a process group for one process, wrap the module. Does not own: the arguments
(``arguments``), the private steps (``hooks``), or what processes tell each other (``processes``).
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn

from lightning_dp.strategies import checks
from lightning_dp.strategies.arguments import PrivateStrategy, Starting
from lightning_dp.strategies.launching import PrivateLauncher


class DPStrategy(PrivateStrategy, DDPStrategy):
    """Trains any LightningModule with differential privacy, unchanged, by DP-SGD with per-sample clipping.

    Each step draws every training example with probability ``batch_size / N`` (Poisson sampling), bounds each example's
    gradient, adds Gaussian noise once and divides by the expected batch size:
    ``grad = (sum_i clip(g_i) + noise) / batch_size``, noise std ``noise_multiplier * max_grad_norm`` per coordinate.

    Guarantee: no parameter update depends on the training data except through the clipped, noised sum; the reported
    epsilon is an upper bound on what all releases of the run and its resumes have spent, for adding or removing one
    example, or one user with all of theirs if the data is a `PrivateDataset` with ``user_ids``; ``target_epsilon`` is
    never exceeded. What cannot be trained so is refused with an error. Not covered: what training steps log, callbacks
    that read the data, validation data, and choices made after looking at results.

    On several devices and nodes (``Trainer(devices=..., num_nodes=...)``) mechanism, epsilon and result are the same:
    the dataloader's batch size is that of one process, as in ordinary data-parallel training, each process takes its
    share of every draw, and the noise is added once in all.

    Args:
        target_epsilon: Budget in nats. Training never exceeds it; `PrivacyBudgetStopping` ends the fit before.
        target_delta: Probability with which epsilon may fail; below 1/N. Default: 1 / (10 N).
        noise_multiplier: Standard deviation of the noise divided by ``max_grad_norm``. Default: calibrated so that the
            planned number of steps spends ``target_epsilon``. 0 trains without privacy, for debugging.
        max_grad_norm: The largest L2 norm (not squared) of what one example adds to the sum of gradients. Default: 1;
            with a `Clipping` object the object's own, and no other.
        clipping: ``"flat"`` shortens longer gradients to ``max_grad_norm``; ``"automatic"`` brings all near it;
            ``"psac"`` does so, and weighs short ones less; ``"per_layer"`` shortens each layer's on its own;
            ``"adaptive"`` is flat with a bound that follows the median norm. Or a `Clipping` object with settings.
        max_physical_batch_size: The most examples processed at a time; changes memory and speed, never the result.
            Default: the dataloader's batch size. ``"auto"``: the fastest for each example that fits into the memory,
            found before the first step by trying sizes on a few examples; it is shown, and tells a little of how long
            these are. Manual optimization always has the whole logical batch, ``clipping_engine="loop"`` one example.
        accountant: ``"prv"`` (tight), ``"pld"`` (as tight; needs dp-accounting), ``"rdp"`` (fast) or ``"rdp_filter"``,
            with which noise and batch size of later phases may be chosen by results; or an `Accountant`.
        loss_reduction: Whether ``training_step`` returns the ``"mean"`` or the ``"sum"`` of one loss per sample.
        self_check: Whether to check the bound on a few samples before the first step: that per-sample gradients agree
            with autograd's, and that no sample changes the gradient of another.
        clipping_engine: ``"book"`` finds per-sample gradients by book-keeping in one backward pass; ``"loop"`` runs one
            backward pass per sample: slow, for models with operations that torch does not let us see.
        schedule: How noise and batch size change over the steps, fixed beforehand: a list of `Stage`. Calibration
            counts all of it.
        changed_settings: Whether to ``"refuse"`` to go on after a resume, a second fit or a reloaded dataloader with
            another size of the data, batch size, delta, noise or schedule, or to account what follows as a
            ``"new_phase"`` of the same budget.
        private_statistics: Whether norms before clipping, the clipped share and the training loss are collected, to be
            logged by `PrivacyMonitor`. They are NOT private: epsilon does not cover whoever sees them.
        process_group_backend: Of several processes, such as ``"gloo"``. Default: NCCL on GPUs, Gloo on the CPU.
        timeout: How long a process waits for the others before it gives up.
        start_method: How the processes of this node are started, if nothing else (torchrun, SLURM) has started them:
            ``"popen"`` runs the script once more for each; ``"spawn"``, ``"fork"`` and ``"forkserver"`` go on from
            here, in a notebook ``"fork"``.

    Raises:
        PrivacyConfigurationError: If an argument is out of range, or neither target nor noise is given.

    Example:
        >>> trainer = pl.Trainer(max_epochs=10, strategy=DPStrategy(target_epsilon=3.0))  # doctest: +SKIP
        >>> trainer.fit(model, train_dataloader)  # doctest: +SKIP
    """

    strategy_name = "dp"

    def _begin_processes(self, starting: Starting) -> None:
        DDPStrategy.__init__(
            self,
            process_group_backend=starting.process_group_backend,
            timeout=starting.timeout,
            start_method=starting.start_method,
        )

    # ---- setup: one process needs neither launcher nor process group -------------------------------------------

    @property
    def _is_single(self) -> bool:
        return self.num_nodes * self.num_processes == 1

    # A single process is alone, whatever started it: a script may train on several devices, and test on one.

    @property
    def local_rank(self) -> int:
        """0 for a single process."""
        return 0 if self._is_single else super().local_rank

    @property
    def global_rank(self) -> int:
        """0 for a single process."""
        return 0 if self._is_single else super().global_rank

    @property
    def world_size(self) -> int:
        """1 for a single process."""
        return 1 if self._is_single else super().world_size

    def _configure_launcher(self) -> None:
        if self._is_single:
            return
        super()._configure_launcher()
        if self._start_method != "popen":
            self._launcher = PrivateLauncher(self, start_method=self._start_method)

    def setup_distributed(self) -> None:
        """Set the ranks, and make no process group for a single process."""
        if self._is_single:
            self.set_world_ranks()
        else:
            super().setup_distributed()

    def _setup_plainly(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            checks.check_whole(self._module)
        Strategy.setup(self, trainer)  # that of DDPStrategy wraps the module

    def _setup_model(self, model: Any) -> Any:
        """Take over the weights of the first process; DDP's reducer would wait for gradients from autograd."""
        self._run.processes.share({**dict(model.named_parameters()), **dict(model.named_buffers())})
        return model


# The command line explains the arguments of other private strategies by those of the constructor that they inherit.
PrivateStrategy.__init__.__doc__ = DPStrategy.__doc__

StrategyRegistry.register(DPStrategy.strategy_name, DPStrategy, description="Differentially private training")
