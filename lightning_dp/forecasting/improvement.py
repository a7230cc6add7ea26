"""How much one private step improves the loss, by a quadratic model of it: what batch size and learning rate to choose.

Owns: the formulas. Does not own: the estimates that go into them (``coverage.curvature``), or any privacy.

For a step ``w - lr g`` on a loss with gradient ``G`` and Hessian ``H``, by arXiv 2402.18752, section 3. The mean of
``g`` is ``c G``. Its covariance is ``c^2 S / B`` from the choice of B examples, S the covariance of their gradients,
and ``s^2 / B^2`` on every coordinate from noise. So the loss improves on average by::

    lr c |G|^2 - lr^2 c^2 D / 2,    D = G'HG + tr(HS) / B + s^2 tr(H) / (B c)^2

The best learning rate is ``|G|^2 / (c D)``. It improves the loss by ``|G|^4 / (2 D)``, and for each of the B examples
by ``|G|^4 / (2 (B G'HG + tr(HS) + s^2 tr(H) / (B c^2)))``. The last term, the *decelerator*, is what noise costs.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_dp.errors import PrivacyConfigurationError

ENDINGS = (".json", ".md")


@dataclass(frozen=True)
class Curvature:
    """The loss around the present weights, on public examples.

    Args:
        signal: ``|G|^2``, G the mean gradient: the squared norm.
        along: ``G'HG``, the curvature along the mean gradient.
        covariance: ``tr(HS)``, S the covariance of the examples' gradients.
        trace: ``tr(H)``, the sum of the curvatures of all directions.
        clipping: c, the mean factor by which clipping shortens an example's gradient.
        num_examples: How many public examples were looked at.
        num_probes: How many random directions, for the two traces.
    """

    signal: float
    along: float
    covariance: float
    trace: float
    clipping: float
    num_examples: int
    num_probes: int

    def best_batch_size(self, noise_std: float) -> float | None:
        """Return the batch size B with the greatest improvement for each example, ``s sqrt(tr(H) / (c^2 G'HG))``.

        Args:
            noise_std: s, the standard deviation of the noise on the sum of clipped gradients, in every coordinate.

        Returns:
            ``None`` if the loss is not curved upwards, so that there is none.
        """
        if min(self.along, self.trace) <= 0:
            return None
        return noise_std * math.sqrt(self.trace / self.along) / self.clipping

    def step(self, batch_size: float, noise_std: float) -> StepImprovement:
        """Return what a step of this batch size improves.

        Args:
            batch_size: B, the expected number of examples.
            noise_std: s, the standard deviation of the noise on the sum of clipped gradients, in every coordinate.
        """
        decelerator = noise_std**2 * self.trace / (batch_size * self.clipping**2)
        cost = batch_size * self.along + self.covariance + decelerator
        best = None if cost <= 0 else 0.5 * self.signal**2 / cost
        return StepImprovement(
            batch_size=batch_size,
            noise_std=noise_std,
            along=batch_size * self.along,
            covariance=self.covariance,
            decelerator=decelerator,
            per_example=best,
            learning_rate=None if best is None else self.signal * batch_size / (self.clipping * cost),
        )


@dataclass(frozen=True)
class StepImprovement:
    """What one step improves at its best learning rate, by the quadratic model.

    Args:
        batch_size: B, the expected number of examples.
        noise_std: s, on the sum of clipped gradients.
        along: ``B G'HG``: what curvature along the mean gradient costs.
        covariance: ``tr(HS)``: what the choice of examples costs.
        decelerator: ``s^2 tr(H) / (B c^2)``: what noise costs.
        per_example: How much the loss falls, for each example: ``|G|^4`` over twice the sum of the three; ``None`` if
            that sum is not positive, as the model then has no best step.
        learning_rate: Of SGD, with which it falls so.
    """

    batch_size: float
    noise_std: float
    along: float
    covariance: float
    decelerator: float
    per_example: float | None
    learning_rate: float | None

    @property
    def per_step(self) -> float | None:
        """How much the loss falls in one step."""
        return None if self.per_example is None else self.per_example * self.batch_size

    @property
    def share_of_noise(self) -> float:
        """The share of the decelerator in the sum of the three terms."""
        total = self.along + self.covariance + self.decelerator
        return self.decelerator / total if total else 0.0


@dataclass(frozen=True)
class Improvement:
    """What steps improve at the present weights, for several batch sizes.

    Args:
        curvature: The terms that do not depend on the batch size.
        planned: Of the planned batch size.
        steps: For several batch sizes, each with the noise that spends the same epsilon in as many examples.
        best_batch_size: For the planned noise; ``None`` if the model has none.
    """

    curvature: Curvature
    planned: StepImprovement
    steps: tuple[StepImprovement, ...]
    best_batch_size: float | None


def check_ending(path: str) -> Path:
    """Return where an improvement is to be written.

    Raises:
        PrivacyConfigurationError: If it is no such file.
    """
    file = Path(path)
    if file.suffix not in ENDINGS or not file.parent.is_dir():
        raise PrivacyConfigurationError(
            f"improvement={path!r}: expected True, or a file that ends in {' or '.join(ENDINGS)}, in a directory that "
            "exists."
        )
    return file


def write_improvement(improvement: Improvement, file: Path) -> None:
    """Write the numbers as JSON, or as a Markdown table, by the ending of the file."""
    if file.suffix == ".json":
        file.write_text(json.dumps(asdict(improvement), indent=1) + "\n")
        return
    names, *rows = table_of(improvement)
    lines = [names, ["---:"] * len(names), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    file.write_text(f"{text}\n\n{sentence_of(improvement)}\n")


def table_of(improvement: Improvement) -> list[list[str]]:
    """Return the table as text: the names of the columns, then the rows."""
    names = ["batch size", "noise std", "B G'HG", "tr(HS)", "decelerator", "noise share", "gain / example", "best lr"]
    return [names, *([*map(_shown, _row(step))] for step in improvement.steps)]


def _row(step: StepImprovement) -> tuple[float | None, ...]:
    terms = (step.batch_size, step.noise_std, step.along, step.covariance, step.decelerator)
    return (*terms, step.share_of_noise, step.per_example, step.learning_rate)


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def sentence_of(improvement: Improvement) -> str:
    """Return what the table is about."""
    c, best = improvement.curvature, improvement.best_batch_size
    found = "none, as the loss is not curved upwards" if best is None else f"{best:,.4g}"
    return (
        f"At the present weights, on {c.num_examples} public examples: |G|^2 {c.signal:.4g}, G'HG {c.along:.4g}, "
        f"tr(HS) {c.covariance:.4g}, tr(H) {c.trace:.4g} ({c.num_probes} random directions), mean clipping factor "
        f"{c.clipping:.4g}. The batch size with the greatest gain for each example at noise std "
        f"{improvement.planned.noise_std:.4g}: {found}. The gain is what a quadratic model of the loss says of one "
        "step of SGD at its best learning rate; it changes as training goes on (arXiv 2402.18752)."
    )
