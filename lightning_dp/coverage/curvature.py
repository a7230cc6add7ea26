"""The curvature of the loss around the present weights, on public examples alone.

Owns: the estimates. Does not own: what follows from them (``forecasting.improvement``).

Hessian-vector products need two backward passes, so the training step runs in evaluation mode, and attention by its
plain formula. ``tr(H)`` is the mean of ``z'Hz`` over random signs z (Hutchinson). ``tr(HS)`` is the mean of ``v'Hv``
for ``v = sum_i e_i (g_i - G) / sqrt(n)`` with random signs e: the mean of ``v v'`` is S, the covariance of the g_i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_dp.clipping import NormClipping
from lightning_dp.errors import UnsupportedModelError
from lightning_dp.forecasting.improvement import Curvature

Vector = list[Tensor]


@dataclass(frozen=True)
class Examples:
    """Public examples, each alone and all together.

    Args:
        loss: Returns the mean loss of a batch.
        singles: Return a batch of one example each.
        chunks: Return batches that together hold the same examples, and how many each holds.
    """

    loss: Callable[[Any], Tensor]
    singles: Sequence[Callable[[], Any]]
    chunks: Sequence[tuple[Callable[[], Any], int]]


def curvature(
    parameters: Sequence[nn.Parameter], examples: Examples, clipping: NormClipping, num_probes: int = 32, seed: int = 0
) -> Curvature:
    """Estimate the terms of the improvement of a step.

    The examples are taken for the whole of the data: with n of them ``|G|^2`` is too large by about the variance of an
    example's gradient over n.

    Args:
        parameters: Those that are trained.
        examples: What the loss is found on.
        clipping: Tells c.
        num_probes: Random directions for each of the two traces.
        seed: Of their random numbers.

    Raises:
        UnsupportedModelError: If the training step cannot be differentiated twice.
    """
    random = torch.Generator().manual_seed(seed)
    count = len(examples.singles)
    signs = torch.randint(0, 2, (num_probes, count), generator=random, dtype=torch.float64) * 2 - 1
    mean, mixed, factor = _gradients(parameters, examples, clipping, signs)
    around = [_around(v, mean, float(row.sum())) for v, row in zip(mixed, signs, strict=True)]
    trace = [[_signs(p, random) for p in parameters] for _ in range(num_probes)]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            forms = _forms(parameters, examples, [mean, *around, *trace])
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"the training step cannot be differentiated twice, which an estimate of the curvature needs: {error} "
            "Leave improvement out."
        ) from error
    return Curvature(
        signal=_inner(mean, mean),
        along=forms[0],
        covariance=sum(forms[1 : 1 + num_probes]) / num_probes / count,
        trace=sum(forms[1 + num_probes :]) / num_probes,
        clipping=factor,
        num_examples=count,
        num_probes=num_probes,
    )


def _gradients(
    parameters: Sequence[nn.Parameter], examples: Examples, clipping: NormClipping, signs: Tensor
) -> tuple[Vector, list[Vector], float]:
    """Return the mean gradient, its sums with random signs, and the mean factor of the clipping."""
    count = len(examples.singles)
    mean = [torch.zeros_like(p) for p in parameters]
    mixed = [[torch.zeros_like(p) for p in parameters] for _ in signs]
    factor = 0.0
    for i, single in enumerate(examples.singles):
        gradient = _gradient(examples.loss(single()), parameters)
        norm = torch.stack([g.norm() for g in gradient]).norm()
        factor += float(clipping.factor(norm[None])) / count
        for total, g in zip(mean, gradient, strict=True):
            total += g / count
        for v, sign in zip(mixed, signs[:, i].tolist(), strict=True):
            for total, g in zip(v, gradient, strict=True):
                total.add_(g, alpha=sign)
    return mean, mixed, factor


def _around(mixed: Vector, mean: Vector, signs: float) -> Vector:
    """Return ``sum_i e_i (g_i - G)``."""
    return [v - signs * g for v, g in zip(mixed, mean, strict=True)]


def _forms(parameters: Sequence[nn.Parameter], examples: Examples, vectors: Sequence[Vector]) -> list[float]:
    """Return ``v'Hv`` for each vector, H the Hessian of the mean loss."""
    count, forms = len(examples.singles), [0.0] * len(vectors)
    for batch, size in examples.chunks:
        gradient = _gradient(examples.loss(batch()), parameters, twice=True)
        for k, vector in enumerate(vectors):
            slope = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
            if slope.requires_grad:  # of a linear loss it is a constant
                if k == 0:
                    _check_twice(slope)
                forms[k] += size / count * _inner(_gradient(slope, parameters, keep=True), vector)
    return forms


def _gradient(value: Tensor, parameters: Sequence[nn.Parameter], *, twice: bool = False, keep: bool = False) -> Vector:
    found = torch.autograd.grad(
        value, list(parameters), create_graph=twice, retain_graph=keep or twice, allow_unused=True
    )
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _check_twice(slope: Tensor) -> None:
    """Raise for a function that can be differentiated only once, where torch cuts the graph and says nothing."""
    waiting, seen = [slope.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Error" in node.name():
            raise RuntimeError("a function of it has no second derivative.")
        waiting += [following for following, _ in node.next_functions]


def _inner(a: Vector, b: Vector) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _signs(p: Tensor, random: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, p.shape, generator=random) * 2 - 1).to(p)
