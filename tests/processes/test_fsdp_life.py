"""What surrounds the steps of a sharded model: checkpoints, evaluation, refusals, arguments."""

import inspect
import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import FSDPStrategy, Strategy, StrategyRegistry

import lightning_dp as ldp
from lightning_dp.callbacks.strategy import private_strategy
from tests.processes import sharded
from tests.processes.world import run

SLOW = pytest.mark.slow
ON_CPU = pytest.mark.skipif(not sharded.ON_CPU, reason="FSDP2 of torch 2.6 needs a GPU")


@ON_CPU
@pytest.mark.parametrize(
    ("saves_shards", "before", "after"),
    [(True, 2, 1), pytest.param(True, 2, 4, marks=SLOW), pytest.param(False, 2, 1, marks=SLOW), (False, 1, 2)],
)
def test_a_fit_goes_on_from_its_checkpoint_on_another_number_of_processes(saves_shards, before, after, tmp_path):
    first = run(before, sharded.checkpoints, before, str(tmp_path), saves_shards, 0, 2, timeout=600)[0]
    then = run(after, sharded.checkpoints, after, str(tmp_path), saves_shards, 2, 4, timeout=600)
    assert (first["releases"], [one["releases"] for one in then]) == (2, [4] * after)
    assert all(one["start"] == first["end"] for one in then)
    draws = {"start": first["start"], "draws": first["draws"] + then[0]["draws"]}
    for name, p in sharded.by_hand(draws, optimizer=torch.optim.Adam).items():
        torch.testing.assert_close(torch.tensor(then[0]["end"][name]).double(), p, rtol=0, atol=1e-6)
    assert len(draws["draws"]) == 4
    assert then[0]["is directory"] == saves_shards
    assert first["validated"] == pytest.approx(first["tested"])
    assert first["predicted"] == 12 // before


@cache
def refusals():
    return run(1, sharded.refusals, timeout=600)[0]


@ON_CPU
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (sharded.Manual, "PrivacyConfigurationError: Manual has automatic_optimization=False"),
        (sharded.Unsharded, "PrivacyConfigurationError: parameter 'net.up' .* is trained and not sharded"),
        (sharded.Loose, "PrivacyConfigurationError: parameter 'scale' of shape .2,. is trained and not sharded"),
        (sharded.Replicated, "PrivacyConfigurationError: parameter 'net.up' lies on a mesh of shape .1, 1."),
        (sharded.TensorParallel, "PrivacyConfigurationError: parameter 'net.outer.weight' is a DTensor that no module"),
        (sharded.Flattened, "UnsupportedModelError: module 'net' is a FullyShardedDataParallel"),
        (sharded.Writing, "UnsupportedModelError: the training step writes into the parameter 'net.blocks.0.first"),
        (sharded.Coupled, r"UnsupportedModelError: self-check \(c\)"),
        (sharded.Branching, "NotObserved: 'addcmul' of 'net.outer.bias' was not used when the model"),
        (sharded.WithWhole, "PrivacyConfigurationError: parameter 'net.up' is sharded over processes"),
    ],
)
def test_what_cannot_be_trained_in_shards_is_refused(module, message):
    assert re.match(message, refusals().get(module.__name__, "nothing"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipping_engine": "loop"}, "clipping_engine='loop' with DPFSDPStrategy"),
        ({"max_physical_batch_size": "auto"}, "max_physical_batch_size='auto' with DPFSDPStrategy"),
        ({"start_method": "spawn"}, "start_method='spawn': expected 'popen'"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
    ],
)
def test_arguments_that_do_not_go_with_shards(arguments, message):
    with pytest.raises(ldp.PrivacyConfigurationError, match=message):
        ldp.DPFSDPStrategy(**{"noise_multiplier": 1.0, **arguments})


def test_public_steps_are_refused():
    with pytest.raises(ldp.PrivacyConfigurationError, match="DPFSDPStrategy has no steps on public data"):
        ldp.DPFSDPStrategy(noise_multiplier=1.0).mix_public(object())


def test_other_strategies_for_sharded_models_are_refused_with_the_reason():
    callback = ldp.PrivacyMonitor()
    with pytest.raises(ldp.PrivacyConfigurationError, match="FSDP1 flattens parameters"):
        private_strategy(SimpleNamespace(strategy=FSDPStrategy()), callback)
    with pytest.raises(ldp.PrivacyConfigurationError, match="DeepSpeed reduces gradients in its own backward pass"):
        private_strategy(SimpleNamespace(strategy=type("DeepSpeedStrategy", (), {})()), callback)
    dp = ldp.DPFSDPStrategy(noise_multiplier=1.0)
    assert private_strategy(SimpleNamespace(strategy=dp), callback) is dp


def test_the_command_line_has_the_same_arguments_and_one_more():
    parser = ArgumentParser()
    parser.add_subclass_arguments(Strategy, "strategy")
    chosen = ["--strategy", "lightning_dp.DPFSDPStrategy", "--strategy.noise_multiplier", "2"]
    taken = parser.parse_args([*chosen, "--strategy.save_distributed_checkpoint", "false"])
    own = set(inspect.signature(ldp.DPStrategy).parameters)
    assert set(vars(taken.strategy.init_args)) == own | {"save_distributed_checkpoint"}
    dp = parser.instantiate_classes(taken).strategy
    assert (dp.noise_multiplier, dp._save_distributed_checkpoint) == (2, False)
    assert StrategyRegistry["dp_fsdp"]["strategy"] is ldp.DPFSDPStrategy


def test_a_successor_saves_as_the_first_does():
    dp = ldp.DPFSDPStrategy(noise_multiplier=1.0, save_distributed_checkpoint=False)
    other = dp.successor(max_physical_batch_size=3)
    assert (other._save_distributed_checkpoint, other._run) == (False, dp._run)
