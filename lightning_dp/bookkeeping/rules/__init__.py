"""Rules: for one torch function, which entries its output gradient makes for the parameters that entered it.

A rule takes an `Operation` and the function's own arguments, says what must be saved, and returns the function that
files entries in the backward pass. A function without a rule goes through ``generic``, which is exact for any function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.bookkeeping.functions import out_of_place
from lightning_dp.bookkeeping.operation import Rule
from lightning_dp.bookkeeping.rules.broadcast import (
    addition,
    broadcast,
    multiplication,
    repeat,
    reversed_subtraction,
    subtraction,
)
from lightning_dp.bookkeeping.rules.convolution import convolution, transposed_convolution
from lightning_dp.bookkeeping.rules.embedding import embedding, lookup
from lightning_dp.bookkeeping.rules.linear import addmm, linear, matmul
from lightning_dp.bookkeeping.rules.normalization import group_norm, layer_norm, rms_norm
from lightning_dp.bookkeeping.rules.recurrent import cell, recurrent
from lightning_dp.bookkeeping.rules.registered import REGISTERED

_RULES: dict[Callable[..., Any], Rule] = {
    F.linear: linear,
    torch.addmm: addmm,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    Tensor.expand: broadcast,
    torch.broadcast_to: broadcast,
    Tensor.repeat: repeat,
    torch.mul: multiplication,
    torch.multiply: multiplication,
    Tensor.mul: multiplication,
    Tensor.multiply: multiplication,
    Tensor.__mul__: multiplication,
    Tensor.__rmul__: multiplication,
    out_of_place(Tensor.mul_): multiplication,
    out_of_place(Tensor.__imul__): multiplication,
    torch.add: addition,
    Tensor.add: addition,
    Tensor.__add__: addition,
    Tensor.__radd__: addition,
    out_of_place(Tensor.add_): addition,
    out_of_place(Tensor.__iadd__): addition,
    torch.sub: subtraction,
    Tensor.sub: subtraction,
    Tensor.__sub__: subtraction,
    Tensor.__rsub__: reversed_subtraction,
    out_of_place(Tensor.sub_): subtraction,
    out_of_place(Tensor.__isub__): subtraction,
    F.embedding: embedding,
    Tensor.__getitem__: lookup,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.rms_norm: rms_norm,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.conv_transpose1d: transposed_convolution,
    F.conv_transpose2d: transposed_convolution,
    F.conv_transpose3d: transposed_convolution,
    torch.lstm: recurrent,
    torch.gru: recurrent,
    torch.rnn_tanh: recurrent,
    torch.rnn_relu: recurrent,
    torch.lstm_cell: cell,
    torch.gru_cell: cell,
    torch.rnn_tanh_cell: cell,
    torch.rnn_relu_cell: cell,
}


def find_rule(func: Callable[..., Any]) -> Rule | None:
    """Return the rule of a torch function, or ``None``."""
    return _RULES.get(func) or REGISTERED.get(func)
