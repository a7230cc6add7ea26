"""The noise: its scale, its distribution and its secrecy."""

import copy
import itertools
import os
import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import lightning_dp as ldp
from lightning_dp import noise
from lightning_dp.noise import SecretRandom, _normal
from tests.models import Regression, ZeroGradient, loader, parameters, trainer, updates

NOISE, BOUND, BATCH, LR, SIZE = 1.5, 0.7, 5, 0.3, 200_000


def noise_update():
    module = ZeroGradient(nn.Linear(3, SIZE // 4), lr=LR)
    before = parameters(module)
    strategy = ldp.DPStrategy(noise_multiplier=NOISE, max_grad_norm=BOUND)
    trainer(strategy, max_steps=1).fit(module, loader(batch_size=BATCH))
    return torch.cat([u.flatten() for u in updates(module, before).values()])


def within_two_per_cent(values, std):
    # The standard error of a standard deviation of 200,000 values is 0.16 %.
    return abs(float(values.std()) / std - 1) < 0.02 and abs(float(values.mean())) < 0.02 * std


def test_scale_of_the_noise_and_that_the_test_rejects_a_wrong_one():
    values, std = noise_update(), LR * NOISE * BOUND / BATCH
    assert within_two_per_cent(values, std)
    assert not within_two_per_cent(values * 1.1, std)
    assert not within_two_per_cent(values * 0.9, std)


def test_noise_is_independent_of_seed_everything():
    results = []
    for _ in range(2):
        pl.seed_everything(1, verbose=False)
        results.append(noise_update())
    correlation = torch.corrcoef(torch.stack(results))[0, 1]
    assert not torch.equal(*results)
    assert abs(float(correlation)) < 0.02


def test_random_numbers_of_the_model_follow_seed_everything():
    class Draws(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            self.drawn = torch.rand(())

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * torch.rand(())

    results = []
    for _ in range(2):
        pl.seed_everything(1, verbose=False)
        module = Draws()
        trainer(max_steps=1).fit(module, loader())
        results.append(float(module.drawn))
    assert results[0] == results[1]


def test_noise_is_normal_by_its_moments_and_tail():
    values = torch.zeros(2_000_000, dtype=torch.float64)
    SecretRandom().add_normal([values], 1.0)
    assert float(values.pow(4).mean()) == pytest.approx(3.0, rel=0.02)
    share = float((values.abs() > 3).double().mean())
    assert share == pytest.approx(0.0027, rel=0.1)


@pytest.fixture
def seeded(monkeypatch):
    """Generators of known seeds in the place of secret ones, each of another."""
    seeds = itertools.count()
    monkeypatch.setattr(noise, "_generator", lambda: np.random.Generator(np.random.SFC64(next(seeds))))


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("threads", [1, 2])
def test_noise_follows_the_normal_distribution_and_that_the_test_rejects_others(threads):
    """By Kolmogorov's distance, which exceeds ``most`` by chance once in 100,000."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = [torch.zeros(size, dtype=torch.float64) for size in (600_001, 399_998, 1)]
        SecretRandom().add_normal(values, 1.0)
    finally:
        torch.set_num_threads(before)
    drawn, most = torch.cat(values).numpy(), 2.5e-3
    assert stats.kstest(drawn, "norm").statistic < most
    assert stats.kstest(drawn * 1.02, "norm").statistic > most
    assert stats.kstest(drawn + 0.01, "norm").statistic > most


@pytest.mark.usefixtures("seeded")
def test_values_of_one_draw_are_independent():
    """Two come from one radius and one angle: neither they nor their squares may be correlated."""
    values = torch.zeros(500_000, dtype=torch.float64)
    SecretRandom().add_normal([values], 1.0)
    for lag in (1, 2**14, 2**15, 2**16, 2**17):  # whatever the pieces are
        one, other = values[:-lag], values[lag:]
        pairs = torch.stack([one, other, one.square(), other.square()])
        assert float(torch.corrcoef(pairs).tril(-1).abs().max()) < 5.0 / len(one) ** 0.5


def test_the_extremes_of_the_generator_give_finite_noise():
    class Extreme:
        def __init__(self, value):
            self.value = value

        def random(self, size):
            return np.full(size, self.value)

    for value, most in ((0.0, 0.0), (1 - 2**-53, 8.58)):
        drawn = _normal(Extreme(value), 5, 1.0)
        assert drawn.shape == (5,)
        assert drawn.isfinite().all()
        assert float(drawn.abs().max()) == pytest.approx(most, abs=0.01)


def test_many_tensors_have_each_their_own_noise():
    """Small ones share a draw, and one is larger than what is drawn at once."""
    shapes = [(3,), (0,), (50, 20), (), (300, 400), (7, 1), (2**15,)]
    totals = [torch.full(shape, 6.0, dtype=dtype) for shape in shapes for dtype in (torch.float32, torch.float64)]
    secret = SecretRandom()
    secret.add_normal(totals, 1.0, 2.0)
    drawn = torch.cat([total.double().flatten() for total in totals]) * 2 - 6
    assert drawn.unique().numel() > 0.99 * drawn.numel()  # of the float32 values a few are equal by chance
    assert float(drawn.std()) == pytest.approx(1.0, rel=0.01)
    for total in totals:
        if total.numel() > 500:
            assert float((total.double() * 2 - 6).std()) == pytest.approx(1.0, rel=0.1)
    fixed = [torch.arange(3.0), torch.full((4,), 8.0)]
    secret.add_normal(fixed, 1e-12, 4.0)
    torch.testing.assert_close(fixed, [torch.arange(3.0) / 4, torch.full((4,), 2.0)])


def test_checkpoint_and_configuration_hold_no_noise_state(tmp_path):
    strategy = ldp.DPStrategy(noise_multiplier=1.0)
    fit = trainer(strategy, max_steps=1)
    fit.fit(Regression(), loader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["lightning_dp"]) == {"version", "ledger", "terms", "directory", "record"}
    assert not any("rng" in key or "generator" in key for key in saved)


def test_noise_differs_after_resume(tmp_path):
    first = trainer(max_steps=1)
    first.fit(ZeroGradient(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    results = []
    for _ in range(2):
        module = ZeroGradient()
        trainer(max_steps=2).fit(module, loader(), ckpt_path=tmp_path / "a.ckpt")
        results.append(parameters(module)["net.weight"])
    assert not torch.equal(*results)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_copies_and_forks_do_not_repeat_the_noise():
    random = SecretRandom()

    def drawn(source):
        values = torch.zeros(4, dtype=torch.float64)
        source.add_normal([values], 1.0)
        return values

    copies = [copy.deepcopy(random), pickle.loads(pickle.dumps(random))]
    draws = [drawn(r) for r in (random, *copies)]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, drawn(random).numpy().tobytes())
        os._exit(0)
    forked = os.read(read, 32)
    os.wait()
    os.close(read)
    os.close(write)
    assert forked != drawn(random).numpy().tobytes()


def test_the_seed_is_longer_than_can_be_tried():
    generator = SecretRandom()._cpu
    assert generator.bit_generator.seed_seq.entropy.bit_length() > 96  # 128 random bits; fewer than 97 by chance 2^-32
