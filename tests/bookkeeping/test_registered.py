"""Operations that torch hides: named with their line, and trained exactly once they are registered."""

import pytest
import torch
from torch import nn

import lightning_dp as ldp
from tests.bookkeeping.cases import Raw, mean_loss, rand, reals
from tests.bookkeeping.oracle import Case, check
from tests.models import Regression, loader, trainer


def hidden_scale():
    """Return a new operation ``x * weight``, hidden from torch."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            return g * weight, (g * x).sum(tuple(range(x.dim() - 1)))

    return Scale


def fit(net, **settings):
    trainer(ldp.DPStrategy(noise_multiplier=1.0, **settings), max_steps=2).fit(Regression(net), loader())


def scaled(scale, **members):
    return Raw(lambda m, x: m.head(scale(x, m.w)) if "head" in members else scale(x, m.w), w=rand(3), **members)


RULES = {"none": None, "own": lambda g, x, w: (None, (g * x).flatten(1, -2).sum(1) if x.dim() > 2 else g * x)}


@pytest.mark.parametrize("shape", [(3,), (5, 3)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_registered_function_is_exact(rule, shape):
    scale = ldp.register_rule(hidden_scale(), RULES[rule])
    check(Case("class", lambda: scaled(scale.apply, head=nn.Linear(3, 2)), reals(*shape), mean_loss))
    wrapped = ldp.register_rule(hidden_scale().apply, RULES[rule])
    check(Case("function", lambda: scaled(wrapped), reals(*shape), mean_loss))


def test_twice_and_derived_and_frozen():
    scale = ldp.register_rule(hidden_scale(), RULES["own"]).apply
    check(Case("twice", lambda: Raw(lambda m, x: scale(scale(x, m.w).tanh(), m.w), w=rand(3)), reals(3), mean_loss))
    check(Case("derived", lambda: Raw(lambda m, x: scale(x, m.w * m.v), w=rand(3), v=rand(3)), reals(3), mean_loss))
    check(
        Case(
            "frozen",
            lambda: Raw(lambda m, x: scale(m.f(x), m.w), w=rand(3), f=nn.Linear(3, 3)),
            reals(3),
            mean_loss,
            trained=lambda name: name != "w",
        )
    )


def test_as_a_decorator():
    @ldp.register_rule
    def double(x, weight):
        return hidden_scale().apply(x, weight) * 2

    assert double.__name__ == "double"
    x, w = torch.randn(4, 3), torch.randn(3)
    torch.testing.assert_close(double(x, weight=w), 2 * x * w)
    check(Case("decorated", lambda: Raw(lambda m, x: double(x, weight=m.w), w=rand(3)), reals(3), mean_loss))


def test_it_trains_through_the_trainer():
    scale = hidden_scale()
    with pytest.raises(ldp.UnsupportedModelError, match=r"'net.w' enters Scale \(.*test_registered.py:\d+\).*register"):
        fit(scaled(scale.apply, head=nn.Linear(3, 2)))
    ldp.register_rule(scale)
    fit(scaled(scale.apply, head=nn.Linear(3, 2)))


def test_a_wrong_rule_is_refused():
    scale = ldp.register_rule(hidden_scale(), lambda g, x, w: (None, g * x * 2))
    with pytest.raises(ldp.UnsupportedModelError, match=r"\(a\).*'net.w'"):
        fit(scaled(scale.apply, head=nn.Linear(3, 2)))


@pytest.mark.parametrize("what", [3, "scale", nn.Linear, None])
def test_what_cannot_be_registered(what):
    with pytest.raises(TypeError, match="expected a subclass of torch.autograd.Function, or a function"):
        ldp.register_rule(what)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_script_is_named_with_its_line():
    @torch.jit.script
    def product(x, w):
        return torch.matmul(x, w.t())

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.w = nn.Linear(3, 4), nn.Parameter(torch.randn(2, 4))

        def forward(self, x):
            return product(self.first(x), self.w)

    with pytest.raises(
        ldp.UnsupportedModelError, match=r"'net.w' .*enters an operation \(.*test_registered.py:\d+\).*register_rule"
    ):
        fit(Scripted())
    fit(Scripted(), clipping_engine="loop")


def test_subclasses_of_a_registered_class_compute_their_own():
    class Registered(hidden_scale()):
        pass

    class Fivefold(Registered):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, 5 * weight)
            return 5 * x * weight

    ldp.register_rule(Registered)
    x, w = rand(2, 3), rand(3)
    torch.testing.assert_close(Registered.apply(x, w), x * w)
    torch.testing.assert_close(Fivefold.apply(x, w), 5 * x * w)
    with pytest.raises(ldp.UnsupportedModelError, match=r"'net.w' enters Fivefold"):
        fit(scaled(Fivefold.apply, head=nn.Linear(3, 2)))


@pytest.mark.parametrize(
    "rule",
    [lambda g, x, w: None, lambda g, x, w: (None,), lambda g, x, w: (None, (g * x).sum(0))],
    ids=["none", "too few", "no sample axis"],
)
def test_what_a_rule_returns_is_checked(rule):
    scale = ldp.register_rule(hidden_scale(), rule)
    with pytest.raises(ldp.UnsupportedModelError, match=r"'apply' was registered with returned .* expected for each"):
        fit(scaled(scale.apply, head=nn.Linear(3, 2)))
