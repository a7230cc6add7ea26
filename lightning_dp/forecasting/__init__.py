"""Forecasts of a budget, from numbers alone: no model, no data, nothing trained and nothing released.

Reading order: ``question`` (what is given and what follows), ``result`` (the numbers, pure data), ``search`` (how a
table of noises is had in seconds), ``tables`` and ``figure`` (how it is shown), ``command`` (``lightning-dp plan`` with
numbers).
"""

from lightning_dp.forecasting.question import forecast
from lightning_dp.forecasting.result import AfterSteps, BatchOption, Forecast, NoiseFor

__all__ = ["AfterSteps", "BatchOption", "Forecast", "NoiseFor", "forecast"]
