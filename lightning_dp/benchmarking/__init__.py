"""What privacy costs in time and memory, measured on real fits that take turns.

Absolute times drift: a machine is shared, a processor gets hot. So every variant is a process of its own that runs a
real fit and waits before each of its steps until it is its turn: A B C A B C ... Only one computes at a time, and what
is compared are steps that lie side by side.

Reading order: ``baton`` (the turn, in the process that computes), ``child`` (the processes), ``race`` (whose turn it
is), ``result`` (medians and ratios), ``fits`` (fits of Lightning that wait for their turn), ``configured`` (fits of a
configuration), ``table`` and ``command``; ``memory`` and ``machine`` beside them.
"""

from lightning_dp.benchmarking.baton import Baton, Facts
from lightning_dp.benchmarking.race import Race
from lightning_dp.benchmarking.result import Ratio, Results, Row, ratio_of

__all__ = ["Baton", "Facts", "Race", "Ratio", "Results", "Row", "ratio_of"]
