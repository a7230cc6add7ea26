"""The example of linear scaling: one search, as its first line says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "linear_scaling.py"


@pytest.mark.slow
def test_a_search_prints_what_it_has_spent_and_found():
    printed = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True).stdout
    spent = re.search(r"epsilon ([0-9.]+) of 1 at delta 0\.0001", " ".join(printed.split()))
    accuracy = re.search(r"test accuracy ([0-9.]+)", printed)
    assert spent is not None
    assert 0.99 < float(spent[1]) <= 1
    assert accuracy is not None
    assert float(accuracy[1]) > 0.7  # of ten digits; single searches came to 0.82 and more
