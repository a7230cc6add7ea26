"""Augmentation multiplicity: several random views of an example are clipped as one, whatever the model.

The oracle is a loop over the examples with autograd in float64: the gradient of the mean loss over the views that were
trained on, clipped, added, and divided by the number of examples. Sample rate 1 and no noise leave nothing to chance
but the views, and those are read from the batches.
"""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import lightning_dp as ldp
from lightning_dp.coverage.table import _settings
from tests.models import trainer
from tests.strategies.test_users import NETS, Mean, Packed, Sum, linear

N = 6


class Augmented(Dataset):
    """Every access gives another view of an example, and the example's number."""

    def __init__(self, shape=(3,), vocabulary=None, n=N):
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, *shape, generator=g, dtype=torch.float64)
        if vocabulary:
            self.x = torch.randint(vocabulary, (n, *shape), generator=g)
        self.y = torch.randn(n, 2, generator=g, dtype=torch.float64)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        view = x + torch.randn_like(x) if x.is_floating_point() else x[torch.randperm(len(x))]
        return view, self.y[index], index


def fit(module, data, batch_size, **settings):
    """Fit one step without noise, and return what it released and the physical batches it was made of."""
    dp = ldp.DPStrategy(**{"noise_multiplier": 0, "target_delta": 0.1, "self_check": False, **settings})
    seen, step = [], module.training_step
    module.training_step = lambda batch, batch_idx: (seen.append(batch), step(batch, batch_idx))[1]
    trainer(dp, max_steps=1).fit(module, DataLoader(data, batch_size=batch_size))
    assert dp.num_releases == 1
    missing, last = len(data) * dp._run.loader.units.views, []
    while missing > 0:  # what was looked at before is not of the step
        last.insert(0, seen.pop())
        missing -= len(last[0][0])
    return {name: p.grad for name, p in module.named_parameters()}, last


def by_hand(module, batches, views, num, bound):
    """Clip the gradient of every example's mean over its views, add, divide."""
    named = dict(module.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    seen = []
    for batch in batches:
        for at in range(0, len(batch[0]), views):
            rows = [part[at : at + views] for part in batch]
            (example,) = set(rows[2].tolist())
            seen.append(example)
            loss = Mean.loss(module, rows)
            parts = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, named.values(), strict=True)]
            norm = float(torch.stack([part.norm() for part in parts]).norm())
            for name, part in zip(named, parts, strict=True):
                total[name] += min(1.0, bound / norm) * part
    assert sorted(seen) == list(range(num))
    return {name: part / num for name, part in total.items()}


def assert_right(module, data, views, physical, bound=0.5, **settings):
    private = ldp.PrivateDataset(data, views_per_example=views)
    found, batches = fit(module, private, len(data), max_physical_batch_size=physical, max_grad_norm=bound, **settings)
    last = batches[-1]
    assert not torch.equal(last[0][0], last[0][1])  # two views of one example
    expected = by_hand(module, _at_start(module, found, batches), views, len(data), bound)
    for name, part in expected.items():
        assert float((found[name] - part).norm()) <= 1e-10 * max(1e-6, float(part.norm())), name


def _at_start(module, released, batches):
    """Put the parameters back to what they were before the step, of rate 1."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_(released[name])
    return batches


@pytest.mark.parametrize(
    ("kind", "views"),
    [(kind, 2) for kind in NETS] + [pytest.param(kind, 4, marks=pytest.mark.slow) for kind in NETS],
)
def test_the_update(kind, views):
    make, shape, vocabulary = NETS[kind]
    assert_right(Mean(make().double()), Augmented(shape, vocabulary), views, physical=2 * views)


@pytest.mark.parametrize("physical", [3, 6, 7, 100])
def test_physical_batches(physical):
    assert_right(Mean(linear().double()), Augmented(), 3, physical)


def test_one_example_at_a_time():
    assert_right(Mean(linear().double()), Augmented(), 3, 3, clipping_engine="loop")
    assert_right(Packed(), Augmented((4, 3)), 2, 4, clipping_engine="loop")


def test_the_self_check_passes():
    fit(Mean(linear().double()), ldp.PrivateDataset(Augmented(), views_per_example=3), N, self_check=True)


def test_a_sum_over_all_rows_is_the_sum_over_views():
    module = Sum(linear().double())
    private = ldp.PrivateDataset(Augmented(), views_per_example=2)
    found, batches = fit(module, private, N, max_grad_norm=1e6, loss_reduction="sum")
    mean = by_hand(module, _at_start(module, found, batches), 2, N, 1e6)
    for name, part in mean.items():
        assert torch.allclose(found[name], 2 * part, rtol=1e-8, atol=1e-12)


def test_users_with_views():
    """Three users of two examples each, both of which they give, in two views: four rows are clipped as one."""
    module, data = Mean(linear().double()), Augmented()
    owner = [0, 1, 2, 0, 1, 2]
    private = ldp.PrivateDataset(data, user_ids=owner, examples_per_user=2, views_per_example=2)
    found, batches = fit(module, private, 6, max_physical_batch_size=4)
    assert [len(batch[0]) for batch in batches] == [4, 4, 4]
    for batch in batches:
        assert batch[2][0] == batch[2][1] != batch[2][2] == batch[2][3]
        assert owner[batch[2][0]] == owner[batch[2][2]]
        batch[2] = torch.full((4,), owner[batch[2][0]])
    expected = by_hand(module, _at_start(module, found, batches), 4, 3, 1.0)
    for name, part in expected.items():
        assert float((found[name] - part).norm()) <= 1e-10 * float(part.norm())


def test_sampling_and_budget_are_those_of_one_view():
    kinds = []
    for views in (1, 5):
        dp = ldp.DPStrategy(noise_multiplier=2.0)
        private = ldp.PrivateDataset(Augmented(n=40), views_per_example=views)
        trainer(dp, max_steps=3).fit(Mean(linear().double()), DataLoader(private, batch_size=10))
        kinds.append([dp.releases(), dp.sample_rate, dp.unit, dp.delta, dp._run.mechanism, len(dp._run.loader)])
    for mechanism in (kinds[0].pop(4), kinds[1].pop(4)):
        assert (mechanism.expected_batch_size, mechanism.noise_std, mechanism.num_units) == (10, 2.0, 40)
    assert kinds[0] == kinds[1]
    assert kinds[0][1:3] == [0.25, "example"]


def test_a_subset_keeps_the_views():
    private = Subset(ldp.PrivateDataset(Augmented(), views_per_example=3), [1, 4, 5])
    module = Mean(linear().double())
    _, batches = fit(module, private, 3)
    assert sorted(torch.cat([batch[2] for batch in batches]).tolist()) == [1, 1, 1, 4, 4, 4, 5, 5, 5]


def test_what_is_shown():
    private = ldp.PrivateDataset(Augmented(n=40), views_per_example=5)
    fit, data = trainer(ldp.DPStrategy(noise_multiplier=1.0)), DataLoader(private, batch_size=10)
    plan = ldp.plan(fit, Mean(linear().double()), data, show=False)
    assert (plan.expected_batch_size, plan.views_per_example, plan.physical_batch_size) == (10, 5, 10)
    assert dict(_settings(plan))["expected batch"] == "10, 5 views of each"
    fit.fit(Mean(linear().double()), data)
    sampler = fit.strategy.record().sampler
    assert (sampler.examples_per_unit, sampler.views_per_example) == (1, 5)


@pytest.mark.parametrize("views", [0, -1, True, 1.5])
def test_what_is_no_number_of_views(views):
    with pytest.raises(ldp.PrivacyConfigurationError, match="views_per_example=.*: expected an integer of at least 1"):
        ldp.PrivateDataset(Augmented(), views_per_example=views)


def test_a_physical_batch_holds_all_views():
    private = ldp.PrivateDataset(Augmented(), views_per_example=4)
    with pytest.raises(ldp.PrivacyConfigurationError, match="=3 with views_per_example=4: .* Use at least 4"):
        fit(Mean(linear().double()), private, N, max_physical_batch_size=3)
    private = ldp.PrivateDataset(Augmented(), user_ids=[0] * N, examples_per_user=2, views_per_example=4)
    with pytest.raises(ldp.PrivacyConfigurationError, match="examples_per_user=2 and views_per_example=4: .* least 8"):
        fit(Mean(linear().double()), private, 1, max_physical_batch_size=7)


def test_too_large_a_batch():
    private = ldp.PrivateDataset(Augmented(), views_per_example=4)
    with pytest.raises(ldp.PrivacyConfigurationError, match="batch_size=7 .*N=6 .* at most 6;"):
        fit(Mean(linear().double()), private, 7)
