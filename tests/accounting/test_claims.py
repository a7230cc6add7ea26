"""Which claim goes with which run."""

import pytest

from lightning_dp.accounting import Phase, PRVAccountant, RDPFilter, claim, cross_checked

ONE, TWO = [Phase(1.0, 0.1, 3)], [Phase(1.0, 0.1, 3), Phase(2.0, 0.1, 3)]
POISSON, FIXED = "if every logical batch was a fresh Poisson sample", "of every release were fixed before the first one"
EARLY, WHATEVER = "even if results decided to stop early", "whatever results"


@pytest.mark.parametrize(
    ("phases", "accountant", "target", "said", "not_said"),
    [
        (ONE, PRVAccountant(), 3.0, [POISSON, "target epsilon 3 ", EARLY, "smaller epsilon"], [FIXED, WHATEVER]),
        (ONE, PRVAccountant(), None, [POISSON, "if results did not decide when to stop"], [FIXED, EARLY, "target"]),
        (ONE * 2, PRVAccountant(), 3.0, [EARLY], [FIXED]),
        (TWO, PRVAccountant(), 3.0, [POISSON, FIXED, EARLY], [WHATEVER]),
        (TWO, cross_checked(PRVAccountant()), None, [POISSON, FIXED], [EARLY, WHATEVER]),
        (TWO, RDPFilter(3.0), 3.0, [POISSON, "target epsilon 3 ", WHATEVER, "used up"], [FIXED]),
        (TWO, RDPFilter(3.0), None, [POISSON, FIXED], [WHATEVER]),
        ([], PRVAccountant(), 3.0, ["Nothing was released"], [POISSON]),
        ([Phase(0.0, 0.1, 0)], PRVAccountant(), 3.0, ["Nothing was released"], [POISSON]),
        ([*ONE, Phase(0.0, 0.1, 1)], RDPFilter(3.0), 3.0, ["without noise", "no guarantee"], [POISSON]),
    ],
)
def test_claim(phases, accountant, target, said, not_said):
    sentence = claim(phases, accountant, target_epsilon=target)
    assert [part for part in said if part not in sentence] == []
    assert [part for part in not_said if part in sentence] == []
    assert sentence.endswith(".")


def test_a_target_that_was_lowered_is_not_claimed():
    assert "target" not in claim(ONE, PRVAccountant(), target_epsilon=3.0, epsilon=3.5)
    assert "one user" in claim(ONE, PRVAccountant(), target_epsilon=3.0, epsilon=2.5, unit="user")
