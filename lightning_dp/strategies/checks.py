"""What cannot be trained privately as it stands: refused before the first step, each with the way out.

Owns: the refusals about trainer, model, optimizer and loss. Does not own: those about the data (``data.checks``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from lightning_dp.errors import PrivacyConfigurationError, PrivacyError, UnsupportedModelError
from lightning_dp.optimizers import NoiseAware
from lightning_dp.strategies.tree import Tree

_TUNERS = ("LearningRateFinder", "BatchSizeFinder", "_LRCallback")


def check_trainer(trainer: pl.Trainer) -> None:
    """Raise if a setting of the trainer does not go with a private fit."""
    if trainer.accumulate_grad_batches != 1:
        raise PrivacyConfigurationError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: expected 1. The dataloader's batch_size is "
            "the expected logical batch; bound the memory by DPStrategy(max_physical_batch_size=...) instead."
        )
    if str(trainer.precision).startswith("16"):
        raise PrivacyConfigurationError(
            f"precision={trainer.precision!r}: gradients in float16 overflow and are skipped by their content, while "
            "the skipped step still counts. Use precision='bf16-mixed'."
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise PrivacyConfigurationError(
            "overfit_batches is set: fixed batches are no Poisson sample. Use overfit_batches=0, and "
            "limit_train_batches or a smaller dataset to try something quickly."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _check_callback(callback, trainer.lightning_module)


def check_alone(trainer: pl.Trainer, what: str) -> None:
    """Raise if something that runs in one process only is asked for on several.

    Args:
        trainer: Made, and not used yet.
        what: What is asked for, in words.
    """
    if trainer.world_size != 1:
        raise PrivacyConfigurationError(
            f"{what} on {trainer.world_size} devices: it makes several trainers in turn, and other processes "
            "cannot follow. Use devices=1 and num_nodes=1 for it."
        )


def _check_callback(callback: pl.Callback, module: pl.LightningModule) -> None:
    """Raise for a callback that would release more of the training data than the noisy gradients."""
    if type(callback).__name__ in _TUNERS:
        raise PrivacyConfigurationError(
            f"{type(callback).__name__} trains on private data to choose a setting and then rolls the model back, "
            "but not what was released. Choose learning rate and batch size on public data."
        )
    if isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches():
        raise PrivacyConfigurationError(
            f"GradientAccumulationScheduler(scheduling={callback.scheduling}): expected accumulate_grad_batches=1 in "
            "every epoch. The dataloader's batch_size is the expected logical batch; leave the callback out."
        )
    if isinstance(callback, StochasticWeightAveraging):
        for name, layer in module.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                raise PrivacyConfigurationError(
                    f"StochasticWeightAveraging computes the statistics of layer '{name}' ({type(layer).__name__}) "
                    "anew from the training data, without noise. Replace it by GroupNorm or LayerNorm, or average the "
                    "weights by WeightAveraging (Lightning 2.6), which leaves the statistics alone."
                )


def check_module(module: pl.LightningModule, public: Iterable[Optimizer] = ()) -> None:
    """Raise if the LightningModule cannot be trained privately whatever the data.

    Args:
        module: The user's module.
        public: Optimizers whose gradients do not depend on the training data: their layers may use the batch as a
        whole.
    """
    exempt = {id(p) for optimizer in public for group in optimizer.param_groups for p in group["params"]}
    for name, layer in module.named_modules():
        own = {id(p) for p in layer.parameters(recurse=False)}
        if not own or not own <= exempt:
            _check_statistics(name, layer)


def _check_statistics(name: str, layer: nn.Module) -> None:
    """Raise for a layer whose output or buffers depend on other samples of the batch."""
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        at_fault = layer.training and layer.track_running_stats
    else:
        at_fault = isinstance(layer, nn.modules.batchnorm._NormBase) and (layer.training or layer.running_mean is None)
    if not at_fault:
        return
    raise UnsupportedModelError(
        f"layer '{name}' is a {type(layer).__name__} that uses or keeps statistics of the batch: they make every "
        "sample depend on the others, and running statistics would be released without noise. Replace it by GroupNorm "
        "or LayerNorm, or freeze it in evaluation mode with known statistics (layer.eval(), also after each "
        "model.train())."
    )


def check_not_flattened(module: nn.Module) -> None:
    """Raise if parameters are held in a form that has no gradient of a single sample."""
    for name, layer in module.named_modules():
        if isinstance(layer, FullyShardedDataParallel):
            raise UnsupportedModelError(
                f"module '{name}' is a FullyShardedDataParallel (FSDP1): it flattens its parameters into one and "
                "reduces their gradients while the backward pass runs, so that no gradient of a sample is left to "
                "clip. Use torch.distributed.fsdp.fully_shard (FSDP2) in configure_model(), and DPFSDPStrategy."
            )


def check_whole(module: nn.Module) -> None:
    """Raise if a process holds parts of parameters only."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise PrivacyConfigurationError(
                f"parameter '{name}' is sharded over processes (DTensor), and DPStrategy expects each of them to hold "
                "it whole. Use DPFSDPStrategy, which has the same arguments, for a model with fully_shard."
            )


def check_optimizers(
    optimizers: Iterable[Optimizer | LightningOptimizer], gradient_clip_val: float | None = None
) -> None:
    """Raise if an optimizer needs more than one gradient per step, or would be told another noise than there is.

    Args:
        optimizers: Those of the trainer.
        gradient_clip_val: Of the trainer.
    """
    for optimizer in optimizers:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if isinstance(plain, LBFGS):
            raise PrivacyConfigurationError(
                "the optimizer LBFGS evaluates the loss several times per step, and each evaluation would be a "
                "release. Use an optimizer with one gradient per step, such as SGD or Adam."
            )
        if gradient_clip_val and isinstance(plain, NoiseAware):
            raise PrivacyConfigurationError(
                f"gradient_clip_val={gradient_clip_val} with the optimizer {type(plain).__name__}, which takes the "
                "noise out of its moments: clipped once more, released gradients have another noise than it is told. "
                "Leave gradient_clip_val out; each sample is clipped by DPStrategy(max_grad_norm=...) anyway."
            )


def named_groups(module: nn.Module, optimizers: Iterable[Optimizer]) -> dict[Optimizer, dict[str, nn.Parameter]]:
    """Return the parameters that every optimizer trains, by name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        optimizer: {
            names.get(id(parameter), f"optimizer.param_groups[{k}][{j}]"): parameter
            for k, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
            if parameter.requires_grad
        }
        for optimizer in optimizers
    }


def trained_parameters(
    module: nn.Module, optimizers: Iterable[Optimizer], public: Iterable[Optimizer] = ()
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the parameters that are trained, and those that require a gradient without being trained, by name.

    Args:
        module: The user's module.
        optimizers: Train parameters privately.
        public: Train parameters without noise: these are in neither of the two.

    Raises:
        PrivacyConfigurationError: If none is trained.
    """
    groups = named_groups(module, optimizers)
    trained = {name: p for group in groups.values() for name, p in group.items()}
    if not trained:
        raise PrivacyConfigurationError(
            f"no trainable parameter: none of the parameters given to the optimizer of {type(module).__name__} has "
            "requires_grad=True. Unfreeze at least one, and return an optimizer for it from configure_optimizers()."
        )
    held = {id(parameter) for parameter in trained.values()}
    held |= {id(p) for group in named_groups(module, public).values() for p in group.values()}
    others = {n: p for n, p in module.named_parameters() if p.requires_grad and id(p) not in held}
    return trained, others


def check_undivided(others: Iterator[object]) -> None:
    """Raise if a draw came in several physical batches where a training step needs it whole."""
    if next(others, None) is not None:
        raise PrivacyError(
            "a draw of examples, larger than has a probability of 1e-20, does not fit into one training step with "
            "manual optimization. Run the training again."
        )


def facts(tree: Tree, optimizers: Iterable[Optimizer]) -> list[Any]:
    """Return all that the checks of module and parameters go by: nothing is to be checked again for the same objects.

    Args:
        tree: The user's module.
        optimizers: All that train it.
    """
    groups = [(optimizer, group["params"]) for optimizer in optimizers for group in optimizer.param_groups]
    norms = [m for m in tree.modules if isinstance(m, nn.modules.batchnorm._NormBase)]
    in_groups = [p for _, parameters in groups for p in parameters]
    return [
        *tree.held,
        *[x for m in norms for x in (m.training, m.track_running_stats, m.running_mean is None)],
        *[x for optimizer, parameters in groups for x in (optimizer, *parameters)],
        *[p.requires_grad for p in (*tree.parameters, *in_groups)],
        *[_has_hook(p) for p in in_groups],
    ]


def check_hooks(trained: Mapping[str, nn.Parameter]) -> None:
    """Raise if a trained parameter has a hook that would see, or act on, its gradient before noise is added."""
    for name, parameter in trained.items():
        if _has_hook(parameter):
            raise UnsupportedModelError(
                f"parameter '{name}' has a gradient hook: it would act on gradients without noise. Remove it, or "
                "do its work in on_before_optimizer_step, which sees the released gradients."
            )


def _has_hook(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def loss_of(output: Any) -> Tensor | None:
    """Return the loss that ``training_step`` returned, alone or in a mapping; ``None`` to skip the batch.

    Raises:
        PrivacyConfigurationError: If it is no scalar.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        return None
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not torch.is_floating_point(loss):
        found = f"shape {tuple(loss.shape)} and {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise PrivacyConfigurationError(
            f"training_step returned a loss with {found}: expected a scalar floating point tensor, the mean over the "
            "batch (or the sum, with DPStrategy(loss_reduction='sum')) of one loss per sample. Use loss.mean()."
        )
    return loss
