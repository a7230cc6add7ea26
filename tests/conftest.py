"""What every test shares: quiet third parties, and no trace in the working directory."""

import os

import pytest
import torch

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # what LightningCLI calls is not ours

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

# Not ours to mend: a class that Lightning 2.6 uses and torch deprecates; Lightning's advice on small examples.
THIRD_PARTY = (
    r"ignore:`isinstance.treespec, LeafSpec.`",
    r"ignore:.*does not have many workers",
    r"ignore:You defined a `validation_step` but have no `val_dataloader`",
    r"ignore:The number of training batches",
    r"ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    r"ignore:Checkpoint directory .* exists and is not empty",
    r"ignore:No seed found",  # of LightningCLI, unless another test in the same process has set one
)


def pytest_collection_modifyitems(items):
    for item in items:
        for message in THIRD_PARTY:
            item.add_marker(pytest.mark.filterwarnings(message))


@pytest.fixture(autouse=True)
def _same_initial_weights():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _in_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
