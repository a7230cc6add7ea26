"""Which line of the user's own code an error is about, and operations that torch does not let us see.

Owns: the search for both. Does not own: the errors' other words (``refusals``).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_dp.bookkeeping.refusals import opaque
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


class Opaque(UnsupportedModelError):
    """Parameters enter operations that torch does not let us see; the message is that of the first.

    Args:
        reasons: A message for each of them, by name.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = dict(reasons)


def check_opaque(
    loss: Any, names: Mapping[int, str], seen: Set[str], registered: Set[str], again: Callable[[], Any]
) -> None:
    """Raise if a trained parameter enters an operation that torch does not let us see, on its way to the loss.

    Args:
        loss: The loss of an ordinary forward pass, with its graph; anything else is let pass.
        names: Name of each trained parameter by ``id``.
        seen: The parameters that entered functions that were seen.
        registered: Those that entered functions which their author registered.
        again: Runs the forward pass once more.

    Raises:
        Opaque: Naming the parameter, the operation and where it is called or defined.
    """
    entered = list(_entered(loss, names))
    operations = {
        name: f"{_function(node).__name__} ({_definition(_function(node))})"
        for name, node in entered
        if isinstance(node, BackwardCFunction) and name not in registered
    }
    hidden = {name: node for name, node in entered if name not in seen and name not in operations}
    lines = _lines_of(hidden, names, again) if hidden else {}
    for name, node in hidden.items():
        operations[name] = f"an operation ({node.name().removesuffix('Backward0')}, {lines[name]})"
    if operations:
        raise Opaque({name: str(opaque(name, operation)) for name, operation in operations.items()})


def _entered(loss: Any, names: Mapping[int, str]) -> Iterator[tuple[str, Any]]:
    """Yield the nodes of a graph that a trained parameter enters."""
    if isinstance(loss, Tensor) and loss.grad_fn is not None:
        for node in _nodes(loss.grad_fn):
            for entered, _ in node.next_functions:
                name = names.get(id(getattr(entered, "variable", None)))
                if name is not None:
                    yield name, node


def _nodes(root: Any) -> Iterator[Any]:
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _function(node: Any) -> Any:
    return getattr(node, "_forward_cls", type(node))


def _definition(function: Any) -> str:
    try:
        return f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"
    except (OSError, TypeError):  # made at run time, as by torch.compile
        return "compiled code"


def _lines_of(hidden: Iterable[str], names: Mapping[int, str], again: Callable[[], Any]) -> dict[str, str]:
    """Return where parameters enter an operation, by a pass in which autograd notes the lines."""
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        tracebacks = {name: "".join(node.metadata.get("traceback_", [])) for name, node in _entered(again(), names)}
    return {name: _users_line(tracebacks.get(name, "")) for name in hidden}


def _users_line(traceback: str) -> str:
    lines = [f"{file}:{line}" for file, line in re.findall(r'File "(.+?)", line (\d+)', traceback)]
    users = [line for line in lines if not line.startswith(_NOT_THE_USERS)]
    return (users or ["compiled code"])[-1]
