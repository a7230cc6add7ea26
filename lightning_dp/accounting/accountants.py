"""Choosing an accountant by name.

Owns: the names. Does not own: any bound; see ``prv`` (numerical, Gopi et al. 2021), ``pld`` (numerical, Doroshenko et
al. 2022), ``rdp`` (Renyi, Mironov 2017), ``rdp_filter`` (Feldman and Zrnic 2021) and ``rdp_best_of(mean, shape)``
(``best_of``, Papernot and Steinke 2022). All of them bound
``delta(epsilon) = sup_S P[M(D) in S] - e^epsilon P[M(D') in S]``.
"""

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.best_of import RDPBestOf
from lightning_dp.accounting.filter import RDPFilter
from lightning_dp.accounting.pld import PLDAccountant
from lightning_dp.accounting.prv import PRVAccountant
from lightning_dp.accounting.rdp import RDPAccountant
from lightning_dp.errors import PrivacyConfigurationError

_ACCOUNTANTS: dict[str, type[Accountant]] = {
    kind.name: kind for kind in (PRVAccountant, RDPAccountant, PLDAccountant, RDPFilter)
}


def resolve_accountant(accountant: str | Accountant) -> Accountant:
    """The accountant of that name; an accountant itself is returned as it is.

    Args:
        accountant: ``"prv"`` (tight), ``"rdp"`` (fast), ``"pld"`` (tight, another library, optional), ``"rdp_filter"``
            (noise and rate may follow the results; see :meth:`Accountant.for_target`) or an :class:`Accountant`. Also
            the name of an :class:`RDPBestOf`, as a random search leaves it.

    Returns:
        The accountant.

    Raises:
        PrivacyConfigurationError: If there is none of that name, or its library is not installed.
    """
    if isinstance(accountant, Accountant):
        return accountant
    if isinstance(accountant, str) and accountant in _ACCOUNTANTS:
        return _ACCOUNTANTS[accountant]()
    if isinstance(accountant, str) and (found := RDPBestOf.from_name(accountant)) is not None:
        return found
    *most, last = (f'"{name}"' for name in _ACCOUNTANTS)
    choices = f"{', '.join(most)} or {last}"
    raise PrivacyConfigurationError(f"accountant={accountant!r}: expected {choices}, or an Accountant object.")
