"""The update on several processes: against a loop of autograd.grad over the samples, and against one process."""

import os

import numpy as np
import pytest
import torch

from tests.models import Regression, clipped_mean, parameters
from tests.processes import fits
from tests.processes.world import run

SIZES = [1, 2, 4]
ALIKE = [
    *("whole", "automatic", "per_layer", "adaptive", "statistics", "auto", "manual", "users"),
    *("public first", "public until a plateau", "public beside"),
]
"""Fits in which nothing is left to chance."""
OF_FOUR = ("whole", "few", "adaptive", "manual", "public beside")
"""The others are made by two processes only: with four on one core they take their time."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every process found in worlds of one, two and four."""
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("worlds"))
    yield {1: [fits.updates(1)], 2: run(2, fits.updates, 2), 4: run(4, fits.updates, 4, OF_FOUR)}
    os.chdir(here)


def by_hand(one, n, expected, automatic=False):
    """The same in one process: a loop of autograd.grad over the samples of each draw."""
    module = Regression(fits.network())
    module.load_state_dict({name: torch.tensor(p, dtype=torch.float64) for name, p in one["start"].items()})
    x, y = fits.data_of(n, 1).dataset.tensors
    optimizer = module.configure_optimizers()
    for draw in one["draws"]:
        rows = [(x[unit : unit + 1], y[unit : unit + 1]) for unit in draw]
        mean = clipped_mean(module, rows.__getitem__, len(rows), automatic=automatic) if rows else {}
        for name, p in module.named_parameters():
            p.grad = mean[name] * (len(rows) / expected) if rows else torch.zeros_like(p)
        optimizer.step()
    return fits.as_lists(parameters(module))


def error(one, expected):
    return max(float(np.linalg.norm(np.array(p) - np.array(expected[name]))) for name, p in one["end"].items())


@pytest.mark.parametrize(
    ("size", "case", "n", "expected", "automatic"),
    [
        *[(size, "whole", 12, 12, False) for size in SIZES],
        *[(size, "few", 8, 4, False) for size in SIZES],
        (2, "collectives", 8, 4, False),
        (2, "automatic", 12, 12, True),
    ],
)
def test_the_update_is_that_of_a_loop_over_the_samples(found, size, case, n, expected, automatic):
    first, *others = [one[case] for one in found[size]]
    assert first["end"] != first["start"]
    assert all(other["end"] == first["end"] for other in others), "parameters are not bitwise equal"
    assert all(other["draws"] == first["draws"] for other in others)
    assert error(first, by_hand(first, n, expected, automatic)) < 1e-10
    assert first["facts"][:2] == (expected / n, len(first["draws"]))


@pytest.mark.parametrize("size", SIZES[1:])
def test_initial_weights_are_those_of_the_first_process(found, size):
    for one in found[size]:
        assert one["whole"]["start"] == found[1][0]["whole"]["start"]
    torch.manual_seed(1001)
    other = parameters(Regression(fits.network()))
    assert any(other[name].tolist() != p for name, p in found[1][0]["whole"]["start"].items())


@pytest.mark.parametrize("size", SIZES)
def test_a_draw_is_shared_out_without_repetition_in_equally_many_physical_batches(found, size):
    processes = [one["few"] for one in found[size]]
    empty = 0
    for k, draw in enumerate(processes[0]["draws"]):
        shares = [one["shares"][k] for one in processes]
        assert len({len(chunks) for chunks in shares}) == 1
        counts = [len(draw[rank::size]) for rank in range(size)]  # of each, the others are phantoms
        assert max(counts) - min(counts) <= 1
        real = [sum(chunks, [])[:count] for chunks, count in zip(shares, counts, strict=True)]
        assert sorted(sum(real, [])) == draw
        empty += counts.count(0)
    assert size < 4 or empty, "no share was empty, which happens by chance once in 1e6 runs"


@pytest.mark.parametrize(
    ("size", "case"), [*[(2, case) for case in ALIKE], *[(4, case) for case in OF_FOUR if case in ALIKE]]
)
def test_the_result_is_that_of_one_process(found, size, case):
    single = found[1][0][case]
    for one in found[size]:
        assert error(one[case], single["end"]) < 1e-12
        assert one[case]["facts"] == pytest.approx(single["facts"], rel=1e-12)
    moved = [name for name, p in single["end"].items() if p != single["start"][name]]
    assert len(moved) == len(single["end"])


@pytest.mark.parametrize("size", [2])
def test_private_statistics_are_about_all_samples(found, size):
    for one in found[size]:
        for mine, expected in zip(
            one["statistics"]["statistics"], found[1][0]["statistics"]["statistics"], strict=True
        ):
            assert mine == pytest.approx(expected, rel=1e-9)
    shares = {step["clipped_share"] for step in found[1][0]["statistics"]["statistics"]}
    assert shares - {0.0, 1.0}


@pytest.mark.parametrize("size", [2])
def test_one_physical_batch_size_is_found_for_all(found, size):
    sizes = {one["auto"]["physical"] for one in found[size]}
    assert len(sizes) == 1
    assert 1 <= sizes.pop() <= 12 / size


@pytest.mark.parametrize("size", [2])
def test_what_is_logged_is_averaged(found, size):
    """Lightning averages what each process logged; all of them have the same then."""
    values = [one["collectives"]["metrics"]["loss_epoch"] for one in found[size]]
    assert np.isfinite(values[0])
    assert len(set(values)) == 1
