"""Families that are written by hand as often as taken from a library: a U-Net and networks on graphs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bookkeeping.oracle import Batch, Case

B = 4


class Block(nn.Sequential):
    """A convolution, a normalisation and an activation in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU(inplace=True))


class UNet(nn.Module):
    """A U-Net whose two ways up are a transposed convolution and a bilinear interpolation."""

    def __init__(self, channels: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList([Block(3, channels), Block(channels, 2 * channels)])
        self.bottom = Block(2 * channels, 4 * channels)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(4 * channels, 2 * channels, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear")]
        )
        self.join = nn.ModuleList([Block(4 * channels, 2 * channels), Block(3 * channels, channels)])
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


class DenseGraphNetwork(nn.Module):
    """Message passing on adjacency matrices: ``h + relu(A h W)``, then a mean over the nodes."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.readout = nn.Linear(width, 2)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        loops = adjacency + torch.eye(adjacency.shape[-1], dtype=adjacency.dtype)
        scale = loops.sum(-1, keepdim=True).rsqrt()
        loops = scale * loops * scale.mT
        h = self.embed(nodes)
        for layer in self.layers:
            h = h + F.relu(loops @ layer(h))
        return self.readout(h.mean(1))


class EdgeGraphNetwork(nn.Module):
    """Message passing along lists of edges, padded for each sample; the graphs of a batch are numbered as one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(6, width), nn.ReLU(inplace=True), nn.Linear(width, width))
        self.update = nn.Linear(3 + width, width)
        self.readout = nn.Linear(width, 2)

    def forward(self, nodes: Tensor, source: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        batch, count, _ = nodes.shape
        first = torch.arange(batch)[:, None] * count
        flat, to = nodes.flatten(0, 1), (target + first).flatten()
        messages = self.message(torch.cat([flat[(source + first).flatten()], flat[to]], 1)) * valid.reshape(-1, 1)
        received = flat.new_zeros(batch * count, messages.shape[1]).index_add_(0, to, messages)
        h = F.relu(self.update(torch.cat([flat, received], 1)))
        return self.readout(h.unflatten(0, (batch, count)).sum(1))


class ScatterGraphNetwork(EdgeGraphNetwork):
    """The same with the samples on an axis of their own, weighted messages and a maximum over the nodes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.attention = nn.Parameter(torch.randn(width))

    def forward(self, nodes: Tensor, source: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        ends = [nodes.gather(1, index[..., None].expand(-1, -1, nodes.shape[2])) for index in (source, target)]
        messages = self.message(torch.cat(ends, -1))
        messages = messages * (messages @ self.attention).sigmoid()[..., None] * valid[..., None]
        received = messages.new_zeros(*nodes.shape[:2], messages.shape[2])
        received.scatter_add_(1, target[..., None].expand_as(messages), messages)
        return self.readout(F.relu(self.update(torch.cat([nodes, received], -1))).amax(1))


def scenes() -> Batch:
    """Return images and the class of every pixel."""
    return {"x": torch.randn(B, 3, 8, 8), "y": torch.randint(0, 3, (B, 8, 8))}


def segmented(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss over the pixels, as many in every sample."""
    return F.cross_entropy(model(batch["x"]), batch["y"])


def graphs() -> Batch:
    """Return nodes, adjacency matrices, lists of edges (some of them padding) and labels."""
    adjacency = (torch.rand(B, 5, 5) > 0.5).float()
    edges = {"source": torch.randint(0, 5, (B, 7)), "target": torch.randint(0, 5, (B, 7))}
    valid = torch.arange(7) < torch.tensor([7, 4, 5, 2])[:, None]
    return edges | {
        "x": torch.randn(B, 5, 3),
        "adjacency": ((adjacency + adjacency.mT) > 0).float(),
        "valid": valid.float(),
        "y": torch.randint(0, 2, (B,)),
    }


def by_adjacency(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a classifier of graphs."""
    return F.cross_entropy(model(batch["x"], batch["adjacency"]), batch["y"])


def by_edges(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a classifier of graphs given by their edges."""
    return F.cross_entropy(model(batch["x"], batch["source"], batch["target"], batch["valid"]), batch["y"])


OTHER_FAMILIES = [
    Case("U-Net", UNet, scenes, segmented),
    Case("graph-network-dense", DenseGraphNetwork, graphs, by_adjacency),
    Case("graph-network-index-add", EdgeGraphNetwork, graphs, by_edges),
    Case("graph-network-scatter", ScatterGraphNetwork, graphs, by_edges),
]
