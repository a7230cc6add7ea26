"""Configurations that need a network, on made-up data of the same shapes and small networks with random weights."""

import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_dp.cli import DPLightningCLI
from lightning_dp.demos import sst2
from lightning_dp.demos.cifar10 import CIFAR10
from lightning_dp.demos.encoder import load_encoder, load_tokenizer
from lightning_dp.demos.images import HubNetwork, ImageClassifier
from lightning_dp.demos.sst2 import SST2
from tests.demos.test_film_reviews import WORDS, folder  # noqa: F401

CONFIGS = Path(__file__).parents[2] / "configs"
QUIET = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
FEW = ["--trainer.max_steps=2", "--trainer.strategy.target_delta=1e-3", "--trainer.strategy.max_physical_batch_size=4"]
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")


def fitted(monkeypatch, config, *arguments):
    monkeypatch.setattr(sys, "argv", ["lightning-dp"])
    own = [*arguments, *FEW, *QUIET, "--trainer.accelerator=cpu", "--data.batch_size=4"]
    return DPLightningCLI(args=["fit", f"--config={CONFIGS / config}", *own], save_config_callback=None)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- images ------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path, monkeypatch):
    """The files of CIFAR-10 with four images each; only their checksums are not looked at."""
    random, kept = np.random.default_rng(0), tmp_path / "cifar-10-batches-py"
    kept.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}
        (kept / name).write_bytes(pickle.dumps(content))
    (kept / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *rest: Path(path).exists())
    return str(tmp_path)


def test_images_are_those_of_the_files(images):
    data = CIFAR10(batch_size=4, folder=images)
    data.prepare_data()
    data.setup("fit")
    content = pickle.loads((Path(images) / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    image, label = data.train[3]
    assert (len(data.train), len(data.test), int(label)) == (20, 4, 9)
    assert torch.equal(image, torch.tensor(content["data"][3]).view(3, 32, 32) / 255)


def test_the_configuration_of_cifar10(monkeypatch, images):
    pytest.importorskip("timm")
    small = ["--model.backbone=test_vit", "--model.pretrained=false", f"--data.folder={images}"]
    cli = fitted(monkeypatch, "cifar10.yaml", *small)
    assert cli.trainer.strategy.num_releases == 2
    assert 0 < cli.trainer.strategy.epsilon <= 2
    assert all("bias" in name or "head.weight" in name for name in trained(cli.model))
    assert {"backbone.network.head.weight", "backbone.network.head.bias"} < trained(cli.model)


def test_a_new_head_starts_at_zero():
    pytest.importorskip("timm")
    model = ImageClassifier("test_vit", pretrained=False)
    assert torch.equal(model(torch.rand(2, 3, 32, 32)), torch.zeros(2, 10))


def test_weights_that_cannot_be_had_are_an_error_with_the_command(monkeypatch):
    timm = pytest.importorskip("timm")

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    command = (
        r"no weights of backbone='vit': no network\n.*\n  python -c \"import timm; timm.create_model\('vit', pretr"
    )
    with pytest.raises(RuntimeError, match=command):
        HubNetwork("vit")


def test_a_network_of_timm_gives_features(monkeypatch):
    timm = pytest.importorskip("timm")
    make = timm.create_model
    asked = []

    def without_weights(name, pretrained, num_classes):
        asked.append(pretrained)
        return make(name, pretrained=False, num_classes=num_classes)

    monkeypatch.setattr(timm, "create_model", without_weights)
    network = HubNetwork("test_vit").eval()
    x = torch.rand(3, 1, 8, 8)
    assert network(x).shape == (3, network.num_features)
    assert asked == [True]
    images = x.expand(-1, 3, -1, -1)
    large = torch.nn.functional.interpolate(images, network.size, mode="bicubic")
    mean, std = (torch.tensor(network.network.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    assert torch.allclose(network(x), network.network((large - mean) / std), atol=1e-5)


# ---- sentences ---------------------------------------------------------------------------------------------------


def glue(tmp_path):
    rows = [f"{' '.join(WORDS[i % 5 : i % 5 + 3])} \t{i % 2}" for i in range(24)]
    for name, part in {"train.tsv": rows[:20], "dev.tsv": rows[20:]}.items():
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *part]))
    return str(tmp_path)


def test_the_configuration_of_sst2(monkeypatch, tmp_path, folder):  # noqa: F811
    small = [f"--model.encoder={folder}", f"--data.encoder={folder}", f"--data.folder={glue(tmp_path)}"]
    cli = fitted(monkeypatch, "sst2.yaml", *small)
    assert cli.trainer.strategy.num_releases == 2
    assert 0 < cli.trainer.strategy.epsilon <= 3
    assert all("bias" in name or "head.weight" in name for name in trained(cli.model))


def test_sentences_of_the_hub_and_of_a_folder_are_the_same(monkeypatch, tmp_path, folder):  # noqa: F811
    file = glue(tmp_path)
    parts = {"train": "train.tsv", "validation": "dev.tsv"}
    rows = {name: sst2.read_tsv(tmp_path / kept) for name, kept in parts.items()}
    rows = {name: [{**row, "label": int(row["label"])} for row in part] for name, part in rows.items()}
    asked = []
    stub = types.SimpleNamespace(load_dataset=lambda *names: asked.append(names) or rows)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    found = [SST2(encoder=folder), SST2(encoder=folder, folder=file)]
    for data in found:
        data.prepare_data()
        data.setup("fit")
    assert set(asked) == {("nyu-mll/glue", "sst2")}
    lists = [[(t.tolist(), y) for t, y in part] for data in found for part in (data.train, data.test)]
    assert lists[:2] == lists[2:]
    assert [len(part) for part in lists[:2]] == [20, 4]
    assert [y for _, y in lists[1]] == [0, 1, 0, 1]


def test_sentences_that_cannot_be_had_are_an_error_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"SST-2 could not be loaded: .*\n.*\n  pip install datasets && python -c"):
        SST2().prepare_data()


def test_an_encoder_of_the_hub_is_only_asked_for_by_name(monkeypatch):
    transformers = pytest.importorskip("transformers")
    asked = []

    def offline(name, **arguments):
        asked.append((name, arguments))
        raise OSError("no network")

    for kind in ("AutoModel", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", offline)
    for load in (load_encoder, load_tokenizer):
        with pytest.raises(
            RuntimeError, match=r"encoder='hub:some/bert' could not be loaded: no network\n.*\n  hf down"
        ):
            load("hub:some/bert")
        with pytest.raises(FileNotFoundError, match="encoder='some/bert': expected a folder"):
            load("some/bert")
    assert asked == [("some/bert", {"add_pooling_layer": False}), ("some/bert", {})]
