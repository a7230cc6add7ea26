"""Choosing an accountant by name.

Owns: the names. Does not own: any bound; see ``prv`` (numerical, Gopi et al. 2021) and ``rdp`` (Renyi, Mironov 2017),
both of which bound ``delta(epsilon) = sup_S P[M(D) in S] - e^epsilon P[M(D') in S]``.
"""

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.prv import PRVAccountant
from lightning_dp.accounting.rdp import RDPAccountant
from lightning_dp.errors import PrivacyConfigurationError

_ACCOUNTANTS: dict[str, type[Accountant]] = {kind.name: kind for kind in (PRVAccountant, RDPAccountant)}


def resolve_accountant(accountant: str | Accountant) -> Accountant:
    """The accountant of that name; an accountant itself is returned as it is.

    Args:
        accountant: ``"prv"`` (tight), ``"rdp"`` (fast) or an :class:`Accountant`.

    Returns:
        The accountant.

    Raises:
        PrivacyConfigurationError: If there is none of that name.
    """
    if isinstance(accountant, Accountant):
        return accountant
    if isinstance(accountant, str) and accountant in _ACCOUNTANTS:
        return _ACCOUNTANTS[accountant]()
    choices = " or ".join(f'"{name}"' for name in _ACCOUNTANTS)
    raise PrivacyConfigurationError(f"accountant={accountant!r}: expected {choices}, or an Accountant object.")
