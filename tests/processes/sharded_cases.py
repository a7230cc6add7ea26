"""The book-keeping of every model of the shared list of cases, sharded part by part; in a world of one process."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_dp.bookkeeping.sharded import ShardedKeeping
from tests.bookkeeping import oracle
from tests.bookkeeping.cases import CASES
from tests.bookkeeping.recurrent_cases import RECURRENT_CASES

_CONTAINERS = nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict


def outcomes():
    """An empty text for each case whose norms and sums are exact, and otherwise what went wrong, by name."""
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}")
    found = {}
    for case in [*CASES, *RECURRENT_CASES]:
        if not case.slow:
            try:
                _check(case)
                found[case.name] = ""
            except Exception as error:
                found[case.name] = f"{type(error).__name__}: {error}"
    return found


def _check(case):
    torch.manual_seed(0)
    model, batch = case.build().to(case.dtype).train(), oracle.to_dtype(case.batch(), case.dtype)
    torch.manual_seed(0)
    plain = case.build().to(case.dtype).train()
    oracle.loss_of(case, model, batch)  # lazy layers find their sizes
    oracle.loss_of(case, plain, batch)
    plain.load_state_dict(model.state_dict())
    wanted = {n for n, p in model.named_parameters() if p.requires_grad and case.trained(n)}
    _shard(model, init_device_mesh("cpu", (1,)))
    named = {n: p for n, p in model.named_parameters() if n in wanted}
    others = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in wanted}
    keeping = ShardedKeeping(named, others, model)
    keeping.observe(lambda samples: oracle.loss_of(case, model, oracle.select(batch, ["ab".index(s) for s in samples])))
    whole = {n: p for n, p in plain.named_parameters() if n in wanted}
    for size in case.sizes:
        part = oracle.select(batch, range(size))
        book = oracle.book_of(case, model, part, keeping)
        oracle.compare(case, book, *oracle.reference(case, plain, part, whole))
        assert all(p.grad is None for p in model.parameters()), "a parameter got a gradient"


def _shard(model, mesh):
    """Shard every child that shares no weight, and the whole."""
    held = [(child, {id(p) for p in child.parameters()}) for child in model.children()]
    own = {id(p) for p in model._parameters.values()}
    for child, parameters in held:
        elsewhere = own.union(*(those for other, those in held if other is not child))
        if parameters and not parameters & elsewhere and not isinstance(child, _CONTAINERS):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
