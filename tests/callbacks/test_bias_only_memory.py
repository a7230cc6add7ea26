"""Under training of the biases alone no layer input is kept: counted in bytes that wait for the backward pass."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_dp as ldp
from tests.models import Regression, loader, trainer

BATCH = 12
ITEM = 4  # bytes of a float32


class Weighing(Regression):
    """Notes, in every training step, how many bytes wait for the backward pass that are no parameter's."""

    def __init__(self, net):
        super().__init__(net, lr=0.01)
        self.kept = []

    def training_step(self, batch, batch_idx):
        own = {p.untyped_storage().data_ptr() for p in self.parameters()}
        storages = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage  # kept, so that no other one gets its place
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = super().training_step(batch, batch_idx)
        self.kept.append((len(batch[0]), sum(storage.nbytes() for storage in storages.values())))
        return loss


def chain(width, depth=3):
    return nn.Sequential(nn.Linear(3, width), *[nn.Linear(width, width) for _ in range(depth)], nn.Linear(width, 2))


def kept(width, strategy, callbacks, epochs=1):
    """Return the bytes of the last batch of every epoch: all samples, in one physical batch."""
    module = Weighing(chain(width))
    callbacks = [*callbacks, _Ends()]
    fit = trainer(strategy, max_epochs=epochs, max_steps=-1, enable_checkpointing=False, callbacks=callbacks)
    fit.fit(module, loader(n=BATCH, batch_size=BATCH))
    assert [size for size, _ in callbacks[-1].found] == [BATCH] * epochs
    return [nbytes for _, nbytes in callbacks[-1].found]


class _Ends(pl.Callback):
    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.found.append(pl_module.kept[-1])


def private():
    return ldp.DPStrategy(noise_multiplier=1.0, self_check=False)


@pytest.mark.parametrize("width", [8, 200])
def test_the_book_keeps_as_much_as_ordinary_training_of_the_biases(width):
    (with_privacy,) = kept(width, private(), [ldp.BiasOnlyFinetuning()])
    (without,) = kept(width, "auto", [ldp.BiasOnlyFinetuning()])
    assert with_privacy == without
    (every,) = kept(width, private(), [])
    assert every - with_privacy == BATCH * ITEM * (3 + 4 * width)  # the inputs of five layers


def test_what_is_kept_after_the_switch_does_not_grow_with_the_width():
    narrow = kept(8, private(), [ldp.BiasOnlyFinetuning(after_epoch=1)], epochs=2)
    wide = kept(200, private(), [ldp.BiasOnlyFinetuning(after_epoch=1)], epochs=2)
    assert wide[0] - narrow[0] == BATCH * ITEM * 4 * (200 - 8)
    assert wide[1] == narrow[1] < narrow[0]
