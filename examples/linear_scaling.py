"""Private search of learning rate and steps by linear scaling, with everything paid for.

    python examples/linear_scaling.py                                # one search, on handwritten digits
    python examples/linear_scaling.py --data film_reviews            # on sentences: film_reviews/README.md says how
    python examples/linear_scaling.py --data film_reviews --seeds 5  # five, beside a grid that pays nothing

Private are 900 digits, with the hidden layer of a network that 500 public ones trained, or 8,500 sentences, with the
means of a pre-trained encoder's outputs (384 numbers). 199 other digits and 1,000 other sentences are public, and
choose among the runs. Total epsilon 1, delta 1e-4 or 1e-5. Test accuracy, means of 5 seeds, on one core:

                  search                              best of a grid of 20, chosen by test accuracy, not paid for
    digits        0.939 (.944 .939 .934 .939 .939)    0.946, lr 0.2, 60 steps     2 minutes
    film_reviews  0.770 (.771 .763 .774 .776 .764)    0.784, lr 2, 100 steps      6 minutes, 2 of them for features

The search's noise differs from run to run: 180 searches on digits in a sketch of it in plain torch had a mean of 0.930
(standard deviation 0.019). With 5 % and 10 % of epsilon for the small runs, instead of 5 % and 20 %, digits came to
0.880 (0.92 in the sketch) and film reviews to 0.769.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from statistics import mean

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import lightning_dp as ldp

EPSILON = 1.0
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
RATES, STEPS = (0.02, 0.06, 0.2, 0.6, 2), (10, 25, 60, 100)


@dataclass(frozen=True)
class Parts:
    """Features of the private part, of public ones that choose, and of others to test on."""

    private: ldp.FrozenFeatures
    choosing: ldp.FrozenFeatures
    test: ldp.FrozenFeatures
    num_classes: int
    delta: float

    def head(self, lr: float) -> ldp.LinearHead:
        """A head that is not trained yet."""
        return ldp.LinearHead(self.private.features.shape[1], self.num_classes, lr=lr)


def digits(seed: int) -> Parts:
    """Digits, in another order for every seed."""
    images = load_digits()
    order = torch.randperm(len(images.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images.data / 16).float()[order], torch.tensor(images.target)[order]
    public, choosing, private, test = (
        TensorDataset(*part) for part in zip(*(t.split([500, 199, 900, 198]) for t in (x, y)), strict=True)
    )
    torch.manual_seed(seed)
    encoder = pretrained(*public.tensors)
    return Parts(*(ldp.FrozenFeatures(encoder, part) for part in (private, choosing, test)), 10, 1e-4)


def pretrained(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """The hidden layer of a network trained on the public part."""
    encoder, head = nn.Sequential(nn.Linear(64, 64), nn.Tanh()), nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(head(encoder(x)), y).backward()
        optimizer.step()
    return encoder


def film_reviews(seed: int) -> Parts:
    """Sentences, of which every seed has others that choose; the test is on the same ones always."""
    train, test = sentences()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    private, choosing = (
        TensorDataset(*(t[part] for t in train.tensors)) for part in order.split([len(order) - 1000, 1000])
    )
    return Parts(*(ldp.FrozenFeatures(nn.Identity(), part) for part in (private, choosing, test)), 2, 1e-5)


@cache
def sentences() -> tuple[TensorDataset, TensorDataset]:
    """The means of the encoder's outputs, to train and to test on."""
    from lightning_dp.demos.film_reviews import FilmReviews
    from lightning_dp.demos.sentences import SentenceClassifier, known_means

    data, model = FilmReviews(), SentenceClassifier()
    data.prepare_data()
    data.setup("fit")
    return known_means(model, data.train), known_means(model, data.test)


DATA = {"digits": digits, "film_reviews": film_reviews}


def searched(parts: Parts, seed: int) -> float:
    """Test accuracy after a private search."""
    with tempfile.TemporaryDirectory() as directory:
        result = ldp.tune(
            parts.head,
            parts.private.dataloader(),
            parts.choosing.dataloader(),
            strategy=ldp.DPStrategy(target_epsilon=EPSILON, target_delta=parts.delta),
            selection="public",
            seed=seed,
            directory=directory,
            trainer=QUIET,
        )
        head = ldp.LinearHead.load_from_checkpoint(result.checkpoint)
    result.print()
    return accuracy(head, parts.test)


def best_of_grid(data: Iterable[Parts]) -> tuple[tuple[float, int], list[float]]:
    """The best setting of a grid over all seeds, by test accuracy at the whole epsilon: its choice is not paid for."""
    grid: dict[tuple[float, int], list[float]] = {(lr, steps): [] for steps in STEPS for lr in RATES}
    for parts in data:
        for (lr, steps), accuracies in grid.items():
            accuracies.append(trained(parts, lr, steps))
    return max(grid.items(), key=lambda row: mean(row[1]))


def trained(parts: Parts, lr: float, steps: int) -> float:
    head = parts.head(lr)
    strategy = ldp.DPStrategy(target_epsilon=EPSILON, target_delta=parts.delta, self_check=False)
    pl.Trainer(**QUIET, max_steps=steps, strategy=strategy).fit(head, parts.private.dataloader())
    return accuracy(head, parts.test)


def accuracy(head: ldp.LinearHead, test: ldp.FrozenFeatures) -> float:
    with torch.no_grad():
        return float((head(test.features).argmax(1) == test.labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--seeds", type=int, help="compare with the grid, over so many seeds")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=r".*(does not have many workers|val_dataloader|training batches)")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = [DATA[options.data](seed) for seed in range(options.seeds or 1)]
    found = [searched(parts, seed) for seed, parts in enumerate(data)]
    print(f"test accuracy {mean(found):.4f} ({', '.join(f'{one:.3f}' for one in found)})")
    if options.seeds:
        (lr, steps), grid = best_of_grid(data)
        print(f"best of a grid {mean(grid):.4f} ({', '.join(f'{one:.3f}' for one in grid)}), lr {lr:g}, {steps} steps")


if __name__ == "__main__":
    main()
