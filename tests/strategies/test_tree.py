"""What stands for a walk over the module, against the walk."""

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_dp.strategies import checks
from lightning_dp.strategies.tree import Tree, same


def module():
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return nn.ModuleDict({"inner": inner, "head": nn.Linear(2, 1), "mean": MeanMetric()})


def add_deep_down(m):
    m["inner"][1].added = nn.Linear(1, 1)


def replace(m):
    m["inner"][0] = nn.Linear(2, 2)


def remove(m):
    del m["inner"][0]


def rename(m):
    m._modules["other"] = m._modules.pop("head")


def move_to_the_next(m):
    m["head"].moved = m["inner"].pop(1)


def replace_a_parameter(m):
    m["head"].weight = nn.Parameter(torch.zeros(1, 2))


def share_a_parameter(m):
    m["head"].bias = m["inner"][0].bias


def become_another_class(m):
    m["inner"][0].__class__ = nn.Identity


CHANGES_OF_THE_TREE = [
    add_deep_down,
    replace,
    remove,
    rename,
    move_to_the_next,
    replace_a_parameter,
    share_a_parameter,
    become_another_class,
]


def freeze(m):
    m["head"].bias.requires_grad_(False)


def evaluate(m):
    m["inner"][1].eval()


def drop_statistics(m):
    m["inner"][1].running_mean = None


def register_a_hook(m):
    m["head"].weight.register_hook(lambda g: g)


def register_a_later_hook(m):
    m["head"].weight.register_post_accumulate_grad_hook(lambda p: None)


CHANGES_OF_FACTS = [freeze, evaluate, drop_statistics, register_a_hook, register_a_later_hook]


@pytest.mark.parametrize("change", CHANGES_OF_THE_TREE)
def test_a_changed_module_is_walked_again(change):
    m = module()
    tree = Tree(m)
    before = tree.held
    change(m)
    tree.look()
    assert not same(tree.held, before)
    assert same(tree.modules, list(m.modules()))
    assert same(tree.parameters, list(m.parameters()))
    assert same([*tree.others, *tree.metrics], sorted(m.modules(), key=lambda each: isinstance(each, MeanMetric)))


def test_an_unchanged_module_is_not_walked_again(monkeypatch):
    m = module()
    tree = Tree(m)
    monkeypatch.setattr(nn.Module, "named_modules", None)
    tree.look()
    assert len(tree.modules) == 6


def test_buffers():
    m = module()
    m["inner"][1].register_buffer("none", None)
    assert {id(b) for b in Tree(m).buffers()} == {id(b) for b in m.buffers()}


@pytest.mark.parametrize("change", [*CHANGES_OF_THE_TREE, *CHANGES_OF_FACTS])
def test_what_the_checks_go_by_is_noticed(change):
    m = module()
    tree, optimizers = Tree(m), [torch.optim.SGD(m.parameters(), lr=0.1)]
    before = checks.facts(tree, optimizers)
    assert same(before, checks.facts(tree, optimizers))
    change(m)
    tree.look()
    assert not same(before, checks.facts(tree, optimizers))


def test_other_parameters_of_an_optimizer_are_noticed():
    m = module()
    tree, optimizer = Tree(m), torch.optim.SGD(m["head"].parameters(), lr=0.1)
    before = checks.facts(tree, [optimizer])
    optimizer.add_param_group({"params": list(m["inner"].parameters())})
    grown = checks.facts(tree, [optimizer])
    assert not same(before, grown)
    assert not same(grown, checks.facts(tree, [optimizer, torch.optim.SGD(m["head"].parameters(), lr=0.1)]))
