"""One step of a Trainer on unmodified models of other libraries, against a per-sample loop."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_dp as ldp
from tests.bookkeeping.families import FAMILIES
from tests.bookkeeping.oracle import select, size_of, to_dtype
from tests.models import clipped_mean, trainer

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def relative_error(found, expected):
    scale = torch.stack([g.norm() for g in expected.values()]).norm()
    return float(torch.stack([(found[name].double() - g).norm() for name, g in expected.items()]).norm() / scale)


class Family(pl.LightningModule):
    def __init__(self, case):
        super().__init__()
        self.model, self.loss = case.build(), case.loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.model, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def prepared(case, dtype):
    torch.manual_seed(0)
    module, batch = Family(case).to(dtype), to_dtype(case.batch(), dtype)
    for m in module.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.eval()
    return module.train(), batch


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_one_step(case, dtype):
    module, batch = prepared(case, dtype)
    n = size_of(batch)

    def loop(dtype):
        values = to_dtype(batch, dtype)
        return clipped_mean(copy.deepcopy(module).to(dtype), lambda i: select(values, [i]), n)

    expected = loop(torch.float64)
    samples = [{name: t[k] for name, t in batch.items()} for k in range(n)]
    own = relative_error(loop(dtype), expected)  # what the loop itself loses in this dtype, in deep models
    fit = trainer(ldp.DPStrategy(noise_multiplier=0, max_physical_batch_size=3), max_steps=1)
    fit.fit(module, DataLoader(samples, batch_size=n, shuffle=True))
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert relative_error(found, expected) < max(TOLERANCE[dtype], 2 * own)
