"""What is printed and drawn are the numbers of the forecast."""

import sys

import pytest

import lightning_dp as ldp
from lightning_dp.accounting import Phase
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.forecasting import Forecast
from lightning_dp.forecasting.figure import ForecastFigure
from lightning_dp.forecasting.tables import answer_of, print_forecast

SMALL = {"num_examples": 1000, "batch_size": 100, "accountant": "rdp"}


@pytest.fixture(scope="module")
def found():
    return ldp.forecast(**SMALL, target_epsilon=2.5, num_steps=40)


def printed_rows(printed, *, after):
    """The cells of the table under a title."""
    lines = printed[printed.index(after) :].splitlines()
    start = next(at for at, line in enumerate(lines) if "──" in line) + 1
    return [line.split() for line in lines[start : lines.index(next(x for x in lines[start:] if not x.strip()), start)]]


def test_the_tables_are_those_of_the_forecast(found, capsys):
    print_forecast(found, answer_of(found, "noise_multiplier"))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.startswith(f"Noise: with noise multiplier {found.noise_multiplier:.4g}, 40 steps spend epsilon 2.")
    rows = printed_rows(printed, after="Epsilon over the steps")
    assert [(row[0], row[2]) for row in rows] == [(f"{r.num_steps}", f"{r.epsilon:.4f}") for r in found.after_steps]
    assert [row[0] for row in rows if row[-2:] == ["planned", "end"]] == ["40"]
    rows = printed_rows(printed, after="Noise for other epsilons, 40 steps")
    assert [row[:2] for row in rows] == [[f"{r.epsilon:g}", f"{r.noise_multiplier:.4g}"] for r in found.noise_for]
    assert [row[0] for row in rows if row[-1] == "target"] == ["2.5"]
    rows = printed_rows(printed, after="Other batch sizes, the same work (4 passes), epsilon 2.5")
    assert [int(row[0].replace(",", "")) for row in rows] == [round(o.batch_size) for o in found.batches]
    least = min(o.noise_per_run for o in found.batches)
    for row, option in zip(rows, found.batches, strict=True):
        runs = f"{option.noise_per_step:.3g}", f"{option.noise_per_run:.3g}", f"{option.noise_per_run / least:.2f}"
        assert row[1:7] == [f"{option.sample_rate:.4g}", f"{option.num_steps}", f"{option.noise_multiplier:.4g}", *runs]
    assert [row[0] for row in rows if "best" in row] == [f"{found.best_batch.batch_size:,.0f}"]
    assert [row[0] for row in rows if "planned" in " ".join(row)] == ["100"]
    assert f"Best by noise: batch size {found.best_batch.batch_size:,.0f}, the smallest" in printed


def test_without_n_there_is_a_table_of_sample_rates(capsys):
    found = ldp.forecast(sample_rate=0.1, target_delta=1e-5, noise_multiplier=2.0, num_steps=40, accountant="rdp")
    print_forecast(found, answer_of(found, "target_epsilon"))
    printed = capsys.readouterr().out
    assert printed.startswith("Epsilon: 40 steps with noise multiplier 2 spend epsilon ")
    assert "training examples" not in printed
    rows = printed_rows(printed, after="Other batch sizes")
    assert [row[0] for row in rows] == [f"{o.sample_rate:.4g}" for o in found.batches]
    assert f"Best by noise: sample rate {found.best_batch.sample_rate:.4g}" in printed
    assert [row[0] for row in printed_rows(printed, after="Noise for other") if row[-1] == "planned"] == [
        f"{found.epsilon:.4g}"
    ]


def test_the_answers_in_words():
    longest = ldp.forecast(**SMALL, target_epsilon=2.5, noise_multiplier=3.0)
    assert answer_of(longest, "num_steps").startswith(f"Steps: {longest.num_steps:,} steps with noise multiplier 3 fit")
    endless = ldp.forecast(sample_rate=1e-6, target_delta=1e-5, target_epsilon=50.0, noise_multiplier=50.0)
    assert "Steps: at least 1,000,000,000 steps" in answer_of(endless, "num_steps")


def test_a_resumed_fit_has_one_table(capsys):
    found = Forecast(0.1, 1e-5, 1.0, 7, target_epsilon=9.0, num_allowed=9, spent=(Phase(2.0, 0.1, 5),))
    print_forecast(found, "")
    printed = capsys.readouterr().out
    rows = printed_rows(printed, after="Epsilon over further steps, after 5 made before")
    assert [row[0] for row in rows if row[3:] == ["the", "last", "within", "9"]] == ["9"]
    assert "Noise and batch size were settled" in printed
    assert "Other batch sizes" not in printed


# ---- the picture ---------------------------------------------------------------------------------------------------


def test_the_picture_shows_the_numbers(found, tmp_path):
    figure = ForecastFigure(tmp_path / "plan.png")
    figure.save(found)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    steps, noise, batches = figure._axes
    assert list(steps.lines[0].get_xdata()) == [row.num_steps for row in found.after_steps]
    assert list(steps.lines[0].get_ydata()) == [row.epsilon for row in found.after_steps]
    assert set(steps.lines[1].get_ydata()) == {2.5}
    assert (*steps.lines[2].get_xdata(), *steps.lines[2].get_ydata()) == (40, found.epsilon)
    assert list(noise.lines[0].get_ydata()) == [row.noise_multiplier for row in found.noise_for]
    assert (*noise.lines[1].get_xdata(), *noise.lines[1].get_ydata()) == (2.5, found.noise_multiplier)
    least = min(o.noise_per_run for o in found.batches)
    assert list(batches.lines[0].get_ydata()) == pytest.approx([o.noise_per_run / least for o in found.batches])
    marked = {float(line.get_xdata()[0]) for line in batches.lines[1:]}
    assert marked == {100, found.best_batch.batch_size}


@pytest.mark.parametrize("name", ["plan.svg", "plan.pdf"])
def test_a_picture_of_what_can_be_shown(name, tmp_path):
    figure = ForecastFigure(tmp_path / name)
    figure.save(Forecast(0.3, 1e-5, noise_multiplier=1.0, num_steps=None, accountant="rdp"))
    assert (tmp_path / name).stat().st_size > 0
    assert [axes.axison for axes in figure._axes] == [True, False, False]


def test_a_picture_that_cannot_be_saved_is_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(PrivacyConfigurationError, match=r"plot='plan.doc': expected a file name that ends in .*\.png"):
        ForecastFigure("plan.doc")
    with pytest.raises(PrivacyConfigurationError, match="there is no directory '.*nowhere'"):
        ForecastFigure(tmp_path / "nowhere" / "plan.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PrivacyConfigurationError, match="a plot needs matplotlib"):
        ForecastFigure("plan.png")
