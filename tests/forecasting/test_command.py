"""`lightning-dp plan` with numbers: which arguments it takes, what it prints, how it ends."""

import sys

import pytest

import lightning_dp as ldp
from lightning_dp import cli

SIZES = ["--num_examples=1000", "--batch_size=100", "--accountant=rdp"]
COMMAND = [sys.executable, "-m", "lightning_dp.cli"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lightning-dp", *arguments])
    cli.main()


def test_the_command_prints_what_the_function_returns(monkeypatch, capsys):
    found = ldp.forecast(num_examples=1000, batch_size=100, target_epsilon=2.0, num_epochs=4, accountant="rdp")
    run(monkeypatch, "plan", *SIZES, "--target_epsilon", "2", "--num_epochs", "4")
    printed = capsys.readouterr().out
    expected = f"Noise: with noise multiplier {found.noise_multiplier:.4g}, 40 steps spend epsilon {found.epsilon:.4g}"
    assert printed.startswith(expected)
    for title in ("Epsilon over the steps", "Noise for other epsilons", "Other batch sizes"):
        assert title in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--noise_multiplier=2", "--num_steps=40"], "Epsilon: 40 steps with noise multiplier 2 spend epsilon "),
        (["--noise_multiplier=2", "--target_epsilon=3"], "Steps: "),
        (["--num_steps=40", "--target_epsilon=3"], "Noise: with noise multiplier "),
    ],
)
def test_the_question_is_what_is_left_out(arguments, expected, monkeypatch, capsys):
    run(monkeypatch, "plan", *SIZES, *arguments)
    assert capsys.readouterr().out.startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target_epsilon=2"], "only target_epsilon is given"),
        (["--target_epsilon=2", "--num_steps=4", "--config=x.yaml"], "--config=x.yaml: not an option beside numbers"),
        (["--target_epsilon=2", "--num_steps=4", "--plot=nowhere/plan.png"], "there is no directory 'nowhere'"),
        (["--target_epsilon=two", "--num_steps=4"], "argument --target_epsilon: invalid float value: 'two'"),
        (["--target_epsilon=2", "--num_steps=4", "--target_delta=0.5"], "expected less than 1/N"),
    ],
)
def test_a_mistake_ends_with_status_2_and_the_way_out(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "plan", *SIZES, *arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert printed.out == ""


def test_a_plot_without_matplotlib_is_refused_before_anything_is_computed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("lightning_dp.forecasting.command.forecast", lambda **_: pytest.fail("computed"))
    with pytest.raises(SystemExit):
        run(monkeypatch, "plan", *SIZES, "--target_epsilon=2", "--num_steps=4", "--plot=plan.png")
    assert "a plot needs matplotlib" in capsys.readouterr().err


# ---- what is Lightning's stays Lightning's -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        (["--num_examples=3"], True),
        (["--plot=plan.png", "--sample_rate", "0.1"], True),
        (["--config=x.yaml"], False),
        (["--config=x.yaml", "--plot=plan.png"], False),
        (["--trainer.max_steps=3", "--model=m.M"], False),
        (["--trainer.strategy.target_epsilon=3"], False),
        (["--help"], False),
        ([], False),
    ],
)
def test_numbers_are_told_from_a_fit(arguments, numbers):
    assert cli.COMMANDS["plan"].takes(arguments) == numbers


@pytest.mark.parametrize("arguments", [["fit", "--config=x.yaml"], ["plan", "--config=x.yaml"], ["--help"], []])
def test_everything_else_is_lightnings(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr("lightning_dp.cli.run_lightning", lambda told: seen.append(sys.argv[1:]))
    run(monkeypatch, *arguments)
    assert seen == [arguments]


def test_a_further_command_is_one_line(monkeypatch):
    seen = []
    monkeypatch.setitem(cli.COMMANDS, "report", cli.Command(seen.append, "shows what was spent"))
    run(monkeypatch, "report", "last.ckpt", "--help")
    assert seen == [["last.ckpt", "--help"]]


def test_help_shows_every_way(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "plan", "--help")
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "--num_examples",
        "--target_epsilon",
        "From numbers alone",
        "--config",
        "--trainer.max_steps",
        "--plot",
    ):
        assert text in printed
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "plan with --num_examples and other numbers: what a budget comes to, without a model" in printed
    assert "fit" in printed
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "plan", "--num_steps=3", "--help")
    assert "--trainer" not in capsys.readouterr().out
