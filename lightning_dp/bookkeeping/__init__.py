"""Exact per-sample norms and clipped sums of any torch model, in one backward pass.

The unit is the torch *function* that a trainable parameter enters, not the module it lives in: so raw parameters, tied
and reused weights, broadcast embeddings, subclassed layers and merged adapters need no support of their own.

Reading order: ``engine`` (what a caller sees), ``recorder`` (what happens to one function), ``rules``, ``entries``,
``products``, ``tables``, ``pairs``, ``costs`` (which way to a norm is the cheapest), ``book``; then ``observation``,
``tracing``, ``conclusions`` and ``contents`` (where the samples lie).
"""

from lightning_dp.bookkeeping.base import Keeping
from lightning_dp.bookkeeping.book import Book
from lightning_dp.bookkeeping.engine import BookKeeping
from lightning_dp.bookkeeping.loop import LoopKeeping
from lightning_dp.bookkeeping.passes import Subject
from lightning_dp.bookkeeping.refusals import NotObserved
from lightning_dp.bookkeeping.rules.registered import register_rule
from lightning_dp.bookkeeping.self_check import self_check

__all__ = ["Book", "BookKeeping", "Keeping", "LoopKeeping", "NotObserved", "Subject", "register_rule", "self_check"]
