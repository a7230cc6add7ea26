"""The errors of this library: every one says what was found, what was expected and the way out.

Owns: the exception types. Does not own: any check; each is raised where the fact is known.
"""


class PrivacyError(RuntimeError):
    """Base class of all errors raised by ``lightning_dp``.

    Where a privacy guarantee would break, the library raises one of these; it never goes on with a warning.
    """


class PrivacyConfigurationError(PrivacyError, ValueError):
    """An argument, a trainer setting or a dataloader that cannot be trained privately as it stands."""


class UnsupportedModelError(PrivacyError):
    """A model whose per-sample gradients cannot be found exactly; names the parameter or the layer."""


class PrivacyBudgetExceeded(PrivacyError):
    """The next release would exceed ``target_epsilon``; raised before it is made."""
