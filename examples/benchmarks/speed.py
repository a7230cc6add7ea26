"""Private against ordinary training, and against peers: time and peak memory of whole fits that take turns.

    python examples/benchmarks/speed.py gpt2                           # T=128, physical batch 4
    python examples/benchmarks/speed.py gpt2 --length 1024 --physical 1
    python examples/benchmarks/speed.py resnet50 --variants plain dp
    python examples/benchmarks/speed.py all --device cuda --precision bf16-mixed
    python examples/benchmarks/speed.py gpt2 --sweep length --plot sweep.png

Random weights, random data, nothing is downloaded. How it is measured: `lightning_dp/benchmarking/__init__.py`. Every
table is also appended to examples/benchmarks/results.md (--results). Needs pip install 'lightning-dp[benchmark]'.

Opacus knows neither tied weights nor GPT-2's own layers. It trains a GPT of the same shape of nn.Linear with an untied
head, and is compared with ordinary training of that one (plain_linear).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sweep import SWEEPS, draw_sweep
from variants import PAIRS, VARIANTS, training_of
from workloads import Workload

from lightning_dp.benchmarking import Race, Results
from lightning_dp.benchmarking.child import BenchmarkError
from lightning_dp.benchmarking.machine import this_machine
from lightning_dp.benchmarking.race import WARMUP
from lightning_dp.benchmarking.result import ratios_of
from lightning_dp.benchmarking.table import as_markdown, print_results, write_json

WORKLOADS = {
    "gpt2": Workload("gpt2", physical=4),
    "vit": Workload("vit", physical=8),
    "resnet50": Workload("resnet50", physical=8),
    "resnet152": Workload("resnet152", physical=1, pixels=512),
}
BIAS_ONLY = ("plain", "plain_bias", "dp_bias", "opacus")
ALL = [
    (WORKLOADS["gpt2"], VARIANTS),
    (replace(WORKLOADS["gpt2"], length=1024, physical=1), VARIANTS),
    (WORKLOADS["vit"], VARIANTS),
    (WORKLOADS["resnet50"], VARIANTS),
    (WORKLOADS["resnet152"], BIAS_ONLY),
]


def measure(
    workload: Workload, variants: Sequence[str], device: str, precision: str, rounds: int, warmup: int
) -> Results:
    """Measure the variants of a workload; one that fails is said so, and the others go on."""
    steps = warmup + rounds + 1
    if workload.name != "gpt2":
        variants = [name for name in variants if name != "plain_linear"]  # there is but one
    with Race(warmup) as race:
        for name in variants:
            try:
                race.start(name, training_of(name, workload, device, precision, steps))
            except BenchmarkError as error:
                sys.stderr.write(f"{error}\n")
        rows = race.run(rounds)
    title = f"{workload.title}, {precision}"
    return Results(title, tuple(rows), ratios_of(rows, PAIRS), this_machine(device))


def main() -> None:
    options = _options()
    given = {name: getattr(options, name) for name in ("physical", "length", "pixels", "layers", "width")}
    changes = {name: value for name, value in given.items() if value is not None}
    workloads = ALL
    if options.workload != "all":
        own = BIAS_ONLY if options.workload == "resnet152" else VARIANTS
        workloads = [(WORKLOADS[options.workload], own)]
    workloads = [(replace(workload, **changes), options.variants or own) for workload, own in workloads]
    if options.sweep is not None:
        points = SWEEPS[options.sweep](workloads[0][0], options.points)
        workloads = [(point, options.variants or ("plain", "dp")) for point in points]
    found = []
    for workload, variants in workloads:
        found.append(measure(workload, variants, options.device, options.precision, options.steps, options.warmup))
        print_results(found[-1])
        with options.results.open("a") as file:  # at once: what was measured is not lost if a later one fails
            file.write(f"\n{as_markdown(found[-1])}")
        if options.json is not None:
            write_json(found, options.json)
    if options.plot is not None:
        draw_sweep(options.sweep, [workload for workload, _ in workloads], found, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("workload", choices=[*WORKLOADS, "all"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="by default all that fit the workload")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each that count")
    parser.add_argument("--warmup", type=int, default=WARMUP, help="optimizer steps of each that do not, before")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--physical", type=int, help="examples in a physical batch")
    for name in ("length", "layers", "width"):
        parser.add_argument(f"--{name}", type=int, help="of gpt2")
    parser.add_argument("--pixels", type=int, help="of images")
    parser.add_argument("--sweep", choices=SWEEPS, help="of gpt2: the cost against sequence length or model size")
    parser.add_argument("--points", nargs="+", type=int, help="lengths or widths of the sweep")
    parser.add_argument("--plot", type=Path, help="draw the sweep into this file (needs matplotlib)")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.md"))
    parser.add_argument("--json", type=Path, help="write every step of all tables into this file")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"argument --steps: {options.steps}, expected at least 1")
    if options.warmup < 1:
        parser.error(f"argument --warmup: {options.warmup}, expected at least 1: the first looks at the model")
    if options.sweep is not None and options.workload != "gpt2":
        parser.error("argument --sweep: expected the workload gpt2")
    if options.plot is not None and options.sweep is None:
        parser.error("argument --plot: expected --sweep, whose points are drawn")
    return options


if __name__ == "__main__":
    main()
