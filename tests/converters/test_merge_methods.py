"""Merge methods on one layer: what must be exact, what must be optimal, what must be worse."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hf_attn_converters.families.layouts import LayerHeads, Part
from hf_attn_converters.merge import METHODS, LayerFacts
from hf_attn_converters.merge.grouping import best_groups, group_heads
from hf_attn_converters.merge.kv_heads import change_kv_heads, expand

E, D, HQ = 24, 8, 12

Layer = dict[Part, Tensor]


@dataclass(frozen=True)
class Position:
    """How positions enter: the rotary dimensions of the 8, and how they pair."""

    rotary_dims: int
    interleaved: bool = False


ROPE, GPTJ, PARTIAL, NONE = Position(8), Position(8, True), Position(4), Position(0)
POSITIONS = [
    pytest.param(ROPE, id="rope"),
    pytest.param(GPTJ, id="gptj"),
    pytest.param(PARTIAL, id="partial"),
    pytest.param(NONE, id="no-rope"),
]


def random_layer(kv_heads: int, *, bias: bool = True, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / 4

    layer = {
        Part("q", "weight"): draw(HQ, D, E),
        Part("k", "weight"): draw(kv_heads, D, E),
        Part("v", "weight"): draw(kv_heads, D, E),
        Part("o", "weight"): draw(HQ, D, E),
    }
    if bias:
        layer |= {Part("q", "bias"): draw(HQ, D)}
        layer |= {Part(role, "bias"): draw(kv_heads, D) for role in ("k", "v")}
    return layer


def inputs(count: int = 400, seed: int = 1) -> Tensor:
    """[count, E] with directions of very different size and a mean, as hidden states have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, E, generator=generator, dtype=torch.float64)
    return x * torch.logspace(0.5, -1.5, E, dtype=torch.float64) + 0.3


def facts_for(x: Tensor, at: Position) -> LayerFacts:
    ones = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return LayerFacts(
        rotary_dims=at.rotary_dims, interleaved=at.interleaved, covariance=ones.T @ ones / len(x)
    )


def turn(x: Tensor, at: Position) -> Tensor:
    """RoPE on [H, S, D], written out pair by pair."""
    result = x.clone()
    half = at.rotary_dims // 2
    for f in range(half):
        i, j = (2 * f, 2 * f + 1) if at.interleaved else (f, f + half)
        angle = torch.arange(x.shape[1], dtype=x.dtype) * 0.7**f
        result[..., i] = x[..., i] * angle.cos() - x[..., j] * angle.sin()
        result[..., j] = x[..., j] * angle.cos() + x[..., i] * angle.sin()
    return result


def attention(layer: LayerHeads, x: Tensor, at: Position) -> Tensor:
    """The layer's output [S, E] on inputs [S, E]: dense and causal, in float64."""

    def project(role: str) -> Tensor:
        y = torch.einsum("hde,se->hsd", layer[Part(role, "weight")], x)  # type: ignore[arg-type]
        bias = layer.get(Part(role, "bias"))  # type: ignore[arg-type]
        y = y if bias is None else y + bias[:, None]
        return expand(y, HQ)

    q, k, v = project("q"), project("k"), project("v")
    scores = turn(q, at) @ turn(k, at).mT / D**0.5
    mask = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
    return torch.einsum("hsd,hde->se", weights @ v, layer[Part("o", "weight")])


def error(layer: LayerHeads, other: LayerHeads, at: Position, x: Tensor | None = None) -> float:
    x = inputs(60, seed=2) if x is None else x
    wanted = attention(layer, x, at)
    return float((attention(other, x, at) - wanted).norm() / wanted.norm())


def hide(layer: Layer, at: Position, seed: int = 3) -> Layer:
    """MHA with the same outputs whose heads look unrelated: each uses its exact freedom."""
    generator = torch.Generator().manual_seed(seed)
    wide = {
        p: expand(x, HQ).clone() if p.role in ("k", "v") else x.clone() for p, x in layer.items()
    }

    def apply(role: str, matrix: Tensor, head: int, dims: slice) -> None:
        for kind in ("weight", "bias"):
            x = wide.get(Part(role, kind))  # type: ignore[arg-type]
            if x is not None:
                x[head, dims] = matrix @ x[head, dims]

    def invertible(n: int) -> Tensor:
        return torch.randn(n, n, generator=generator, dtype=torch.float64) + 2 * torch.eye(n)

    half = at.rotary_dims // 2
    for head in range(HQ):
        t = invertible(D)
        apply("v", t, head, slice(None))
        apply("o", torch.linalg.inv(t).T, head, slice(None))
        k_map, q_map = torch.zeros(2, D, D, dtype=torch.float64)
        for f in range(half):
            i, j = (2 * f, 2 * f + 1) if at.interleaved else (f, f + half)
            re, im = torch.randn(2, generator=generator, dtype=torch.float64)
            size = re**2 + im**2
            for m, (a, b) in ((k_map, (re, im)), (q_map, (re / size, im / size))):
                m[i, i] = m[j, j] = a
                m[i, j], m[j, i] = -b, b
        rest = D - at.rotary_dims
        if rest:
            t = invertible(rest)
            k_map[at.rotary_dims :, at.rotary_dims :] = t
            q_map[at.rotary_dims :, at.rotary_dims :] = torch.linalg.inv(t).T
        apply("k", k_map, head, slice(None))
        apply("q", q_map, head, slice(None))
    return wide


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("at", POSITIONS)
def test_csvd_finds_a_hidden_gqa(at: Position, bias: bool) -> None:
    layer = random_layer(2, bias=bias)
    hidden = hide(layer, at)
    assert error(layer, hidden, at) < 1e-9  # the disguise changes nothing
    facts = facts_for(inputs(), at)
    found = change_kv_heads(hidden, 2, METHODS["csvd"], facts)
    assert found[Part("k", "weight")].shape == (2, D, E)
    assert error(layer, found, at) < 1e-6
    assert error(layer, change_kv_heads(hidden, 2, METHODS["mean"], facts), at) > 0.5


def test_control_the_wrong_pairing_finds_nothing() -> None:
    hidden = hide(random_layer(2), ROPE)
    wrong = replace(facts_for(inputs(), ROPE), interleaved=True)
    assert error(hidden, change_kv_heads(hidden, 2, METHODS["csvd"], wrong), ROPE) > 0.05


@pytest.mark.parametrize("at", POSITIONS)
@pytest.mark.parametrize("method", ["csvd", "procrustes"])
@pytest.mark.parametrize(("before", "after"), [(12, 4), (6, 1), (4, 2)])
def test_calibrated_methods_beat_mean(at: Position, method: str, before: int, after: int) -> None:
    layer = random_layer(before)
    facts = facts_for(inputs(), at)
    x = inputs(60, seed=2)
    found = {m: change_kv_heads(layer, after, METHODS[m], facts) for m in (method, "mean")}
    assert error(layer, found[method], at, x) < error(layer, found["mean"], at, x)


def test_csvd_values_are_the_least_squares_optimum() -> None:
    """No small change of the shared head, with the best maps for it, does better."""
    from hf_attn_converters.merge.csvd import shared_head

    layer = random_layer(4, bias=False)
    v, o = layer[Part("v", "weight")], layer[Part("o", "weight")][:4]
    weights, covariance = o @ o.mT, facts_for(inputs(), NONE).covariance[:E, :E]  # type: ignore[index]

    def loss(shared: Tensor) -> Tensor:
        maps = v @ covariance @ shared.T @ torch.linalg.inv(shared @ covariance @ shared.T)
        off = v - maps @ shared
        return torch.einsum("hdc,hca,ab,hdb->", weights, off, covariance, off)

    best, maps = shared_head(v, weights, covariance)
    off = v - maps @ best
    given = torch.einsum("hdc,hca,ab,hdb->", weights, off, covariance, off)
    torch.testing.assert_close(given, loss(best))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = torch.randn(best.shape, generator=generator, dtype=best.dtype) * 0.01
        assert loss(best + step) > loss(best)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_same_number_twice_and_shapes(method: str) -> None:
    layer = random_layer(6)
    facts = facts_for(inputs(), ROPE)
    one, two = (change_kv_heads(layer, 3, METHODS[method], facts) for _ in range(2))
    assert one.keys() == layer.keys()
    for part, x in one.items():
        heads = 3 if part.role in ("k", "v") else HQ
        assert x.shape == (heads, *layer[part].shape[1:]) and x.dtype == layer[part].dtype
        assert torch.equal(x, two[part])
    assert all(torch.equal(layer[p], random_layer(6)[p]) for p in layer)  # the source is untouched


@pytest.mark.parametrize("method", ["csvd", "procrustes"])
def test_norms_on_q_and_k_forbid_to_turn_them(method: str) -> None:
    layer = random_layer(4)
    facts = replace(facts_for(inputs(), ROPE), k_free=False)
    found = change_kv_heads(layer, 2, METHODS[method], facts)
    mean = change_kv_heads(layer, 2, METHODS["mean"], facts)
    for kind in ("weight", "bias"):
        assert torch.equal(found[Part("q", kind)], layer[Part("q", kind)])  # type: ignore[arg-type]
        torch.testing.assert_close(found[Part("k", kind)], mean[Part("k", kind)])  # type: ignore[arg-type]


def test_dead_heads_give_no_nan() -> None:
    layer = random_layer(4)
    for role in ("q", "k", "v", "o"):
        layer[Part(role, "weight")][:3] = 0  # type: ignore[arg-type]
    facts = facts_for(inputs(), ROPE)
    for method in METHODS.values():
        assert all(x.isfinite().all() for x in change_kv_heads(layer, 1, method, facts).values()), (
            method.name
        )


def test_random_differs_by_seed_and_keeps_the_size() -> None:
    layer = random_layer(4)
    a, b = (change_kv_heads(layer, 1, METHODS["random"], LayerFacts(seed=s)) for s in (0, 1))
    part = Part("k", "weight")
    assert not torch.equal(a[part], b[part])
    assert 0.7 < float(a[part].norm() / layer[part][0].norm()) < 1.4


def shuffled(layer: Layer, order: list[int]) -> Layer:
    return {p: x[torch.tensor(order)] for p, x in layer.items()}


@pytest.mark.parametrize("at", POSITIONS)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_grouping_finds_who_belongs_together(at: Position, kv_heads: int) -> None:
    """MHA made of hidden groups, then shuffled: with grouping csvd is exact again."""
    layer = random_layer(kv_heads)
    hidden = hide(layer, at)
    order = torch.randperm(HQ, generator=torch.Generator().manual_seed(4)).tolist()
    mixed = shuffled(hidden, order)
    facts = facts_for(inputs(), at)
    assert error(layer, mixed, at) < 1e-9
    together = group_heads(mixed, kv_heads, facts)
    assert error(layer, together, at) < 1e-9  # moving heads changes nothing
    plain, found = (change_kv_heads(x, kv_heads, METHODS["csvd"], facts) for x in (mixed, together))
    assert error(layer, found, at) < 1e-6
    assert error(layer, plain, at) > 0.05


def test_grouping_keeps_queries_with_their_key() -> None:
    layer = random_layer(4)
    facts = facts_for(inputs(), ROPE)
    moved = group_heads(layer, 2, facts)
    assert error(layer, moved, ROPE) < 1e-9
    control = {**moved, Part("q", "weight"): moved[Part("q", "weight")].roll(1, 0)}
    assert error(layer, control, ROPE) > 0.05


def test_small_groupings_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(8, 2, generator=generator)

    def cost(group: tuple[int, ...]) -> float:
        own = points[list(group)]
        return float((own - own.mean(0)).square().sum())

    found = best_groups(8, 2, cost)
    brute = min(
        cost(one) + cost(tuple(set(range(8)) - set(one)))
        for one in itertools.combinations(range(8), 4)
    )
    assert sum(map(cost, found)) == pytest.approx(brute)
    assert sorted(h for group in found for h in group) == list(range(8))
