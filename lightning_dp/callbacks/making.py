"""The moment at which a LightningModule has made its layers.

Owns: the waiting for it. A callback's ``setup`` comes before the module's own and before ``configure_model``; its next
hook comes after a checkpoint was loaded and the optimizer made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

_HOOKS = ("configure_model", "configure_sharded_model", "setup")
"""Those in which a module may make layers, the last that Lightning calls first."""


def when_made(pl_module: pl.LightningModule, then: Callable[[], None]) -> None:
    """Call ``then()`` when all layers are there, which may be now.

    The last hook of the module that may make some is replaced on the object until it is called.

    Args:
        pl_module: The user's module, in the ``setup`` of a callback.
        then: Called once.
    """
    last = next((hook for hook in _HOOKS if is_overridden(hook, pl_module)), None)
    if last is None:
        then()
    else:
        _once_after(pl_module, last, then)


def _once_after(pl_module: pl.LightningModule, hook: str, then: Callable[[], None]) -> None:
    own, called = vars(pl_module).get(hook), getattr(pl_module, hook)

    def hook_and_then(*args: Any, **kwargs: Any) -> None:
        delattr(pl_module, hook)
        if own is not None:
            setattr(pl_module, hook, own)
        called(*args, **kwargs)
        then()

    setattr(pl_module, hook, hook_and_then)
