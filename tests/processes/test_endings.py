"""How fits on several processes end that cannot go on: all of them, soon, and with every release counted."""

import re
import time
from pathlib import Path

import pytest

import lightning_dp as ldp
from tests.accounting.oracles import pld_epsilon
from tests.models import Regression, trainer
from tests.processes import fits, sharded
from tests.processes.world import World, assert_errors, ended, run

MINUTE = 60
SLOW = pytest.mark.slow


def test_differences_between_processes_are_an_error_in_all_of_them():
    expected = {
        "length": "PrivacyConfigurationError: the size of the training data is not the same in all 2 processes: "
        + re.escape("(20, 20, 'example'), (21, 21, 'example'), by rank."),
        "batch_size": "batch_size of the train dataloader is not the same in all 2 processes: 2, 3, by rank.",
        "max_grad_norm": "max_grad_norm is not the same in all 2 processes: 1.0, 2.0, by rank.",
        "clipping": "clipping is not the same in all 2 processes",
        "check of one process": "PrivacyConfigurationError: the train dataloader is a list: expected a DataLoader",
        "decided by the first": "PrivacyConfigurationError: batch_size_factor=100 of a stage",
        "module": "the module is not the same in all 2 processes",
        "lazy": "'net.0.weight' has no values yet.*configure_model",
        "sums of different steps": "PrivacyError: the processes do not make the same steps",
        "told to nobody": "PrivacyConfigurationError: what the first process has settled cannot be told to the others",
        "different collectives": "PrivacyError: the processes do not make the same steps",
    }
    assert_errors(run(2, fits.refused), expected)


def test_an_error_in_one_process_ends_the_others():
    began = time.monotonic()
    outcomes = ended(2, fits.broken, fits.fail, timeout=2 * MINUTE)
    assert time.monotonic() - began < MINUTE
    (_, first), (_, second) = outcomes
    assert second.startswith("ValueError: something of the user's")
    assert first.startswith("PrivacyError: process 1 has failed with ValueError: something of the user's")


def test_an_error_in_one_process_is_told_before_a_state_is_saved(tmp_path):
    began = time.monotonic()
    (_, first), (_, second) = ended(2, fits.broken_and_saved, fits.fail, str(tmp_path), timeout=2 * MINUTE)
    assert time.monotonic() - began < MINUTE
    assert second.startswith("ValueError: something of the user's")
    assert first.startswith("PrivacyError: process 1 has failed with ValueError: something of the user's")
    assert (tmp_path / "ended.ckpt").exists()


def test_a_sum_is_never_made_with_what_a_process_tells_that_fails():
    assert run(2, fits.summed_while_another_fails) == [None, False]


def test_a_killed_process_ends_the_others_and_no_release_is_forgotten(tmp_path):
    world, began = World(2, fits.broken, fits.kill, str(tmp_path)), time.monotonic()
    try:
        first, killed = world.outcomes(2 * MINUTE)
    finally:
        world.end()
    assert time.monotonic() - began < MINUTE
    assert killed is None
    assert first[1] is not None
    (checkpoint,) = tmp_path.glob("*.ckpt")
    assert len(list(tmp_path.glob("privacy-journal-*.json"))) == 1, "another process than the first one has written"
    assert checkpoint.stem == "step=2"
    dp = ldp.DPStrategy(noise_multiplier=5.0, target_delta=1e-3)
    resumed = trainer(dp, max_steps=4)
    resumed.fit(Regression(fits.network()), fits.data_of(20, 4), ckpt_path=checkpoint)
    # Two steps were released, and a third was booked when the process was killed; then two more.
    assert dp.num_releases == 5
    assert dp.epsilon == pytest.approx(pld_epsilon([(0.2, 5.0, 5)], 1e-3), rel=0.02)


@pytest.mark.skipif(not sharded.ON_CPU, reason="FSDP2 of torch 2.6 needs a GPU")
@pytest.mark.parametrize(
    ("moment", "released"),
    [("before a step", 2), pytest.param("in a backward pass", 2, marks=SLOW), ("in an optimizer's step", 3)],
)
def test_a_killed_process_ends_the_others_that_hold_shards_with_it(moment, released, tmp_path):
    world, began = World(2, sharded.killed, moment, str(tmp_path)), time.monotonic()
    try:
        (_, error), killed = world.outcomes(2 * MINUTE)
    finally:
        world.end()
    assert time.monotonic() - began < MINUTE
    assert killed is None
    assert error is not None
    ((path, releases, epsilon),) = run(1, sharded.gone_on, str(tmp_path))
    assert (path, releases) == ("step=2.ckpt", released + 2)
    assert epsilon == pytest.approx(pld_epsilon([(1.0, 5.0, released + 2)], 1e-3), rel=0.02)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """From one process to two and back: one ledger, and the epsilon of a run that was never interrupted."""
    folder = str(tmp_path)
    one = fits.resumed(1, folder, 3)
    two = run(2, fits.resumed_by_two, folder, one["path"])
    back = fits.resumed(1, folder, 9, two[0]["path"])
    rate = fits.EXPECTED / fits.RESUMED_N
    for found, steps in ((one, 3), (two[0], 6), (two[1], 6), (back, 9)):
        assert found["counts"] == [(fits.RESUMED_NOISE, pytest.approx(rate), steps)]
        epsilon = pld_epsilon([(rate, fits.RESUMED_NOISE, steps)], fits.RESUMED_DELTA)
        assert epsilon - 1e-6 <= found["epsilon"] <= 1.02 * epsilon
    assert two[0]["segments"] == two[1]["segments"]
    for each in two:
        assert "the sample rate is now 0.4 and was 0.2" in each["unadapted"]
    assert not [path for path in Path(folder).iterdir() if path.suffix not in (".ckpt", ".json")]
