"""What a fit would do to every parameter of a model, found out without training: `plan` and what it returns.

Reading order: ``plan`` (a fit that ends in the place of its first step), ``observing`` (what the engine says about
each parameter), ``timing``, ``ahead`` (the budget), ``report`` (the result, pure data), ``names`` and ``table`` (how it
is shown).
"""

from lightning_dp.coverage.planning import plan
from lightning_dp.coverage.report import Coverage, Covered, Plan
from lightning_dp.coverage.table import print_plan

__all__ = ["Coverage", "Covered", "Plan", "plan", "print_plan"]
