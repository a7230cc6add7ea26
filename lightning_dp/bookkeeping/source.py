"""Which line of the user's own code an error is about, and operations that torch does not let us see.

Owns: the search for both. Does not own: the errors' other words (``refusals``).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_dp.errors import UnsupportedModelError

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def calling_line() -> str:
    """Return ``file:line`` of the innermost frame that belongs neither to torch nor to this package."""
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_NOT_THE_USERS):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def check_opaque(loss: Any, names: Mapping[int, str]) -> None:
    """Raise if a trained parameter enters a custom ``torch.autograd.Function`` on its way to the loss.

    Args:
        loss: The loss of an ordinary forward pass, with its graph; anything else is let pass.
        names: Name of each trained parameter by ``id``.

    Raises:
        UnsupportedModelError: Naming the parameter, the function and where it is defined.
    """
    for _, error in opaque_uses(loss, names):
        raise error


def opaque_uses(loss: Any, names: Mapping[int, str]) -> Iterator[tuple[str, UnsupportedModelError]]:
    """Yield each trained parameter that enters a custom ``torch.autograd.Function``, with the error; see above."""
    if not isinstance(loss, Tensor) or loss.grad_fn is None:
        return
    for node in _nodes(loss.grad_fn):
        if isinstance(node, BackwardCFunction):
            for entered, _ in node.next_functions:
                name = names.get(id(getattr(entered, "variable", None)))
                if name is not None:
                    yield name, _opaque(name, node)


def _nodes(root: Any) -> Iterator[Any]:
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _opaque(name: str, node: Any) -> UnsupportedModelError:
    function = getattr(node, "_forward_cls", type(node))
    try:
        where = f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"
    except (OSError, TypeError):  # made at run time, as by torch.compile
        where = "compiled code"
    return UnsupportedModelError(
        f"parameter '{name}' enters {function.__name__} ({where}), a torch.autograd.Function, whose gradient for "
        "each sample cannot be seen. Freeze the parameter (requires_grad_(False)), write the operation in torch "
        "functions, or train it without the book, one sample at a time: DPStrategy(clipping_engine='loop')."
    )
