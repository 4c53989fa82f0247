"""The mathematics of a conversion to latents, part by part, in float64 where it matters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from hf_attn_converters.families.layouts import Part
from hf_attn_converters.merge.affine import Projections, projections
from hf_attn_converters.merge.method import LayerFacts
from hf_attn_converters.mla.deepseek import _inverse
from hf_attn_converters.mla.factors import Factors, factorise, second_moments
from hf_attn_converters.mla.quiet_norm import HIGHEST, quiet_norm
from hf_attn_converters.mla.rotation import choose, mean_turn

H, G, D, E = 4, 2, 8, 24  # query heads, KV heads, head_dim, hidden size
F = D // 2


def layer(seed: int = 0, bias: float = 0.0) -> tuple[Projections, LayerFacts, Tensor]:
    """A random layer, what is known of it, and the inputs ``[N, E]`` that it was measured on."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    counts = {"q": H, "k": G, "v": G, "o": H}
    heads = {Part(role, "weight"): random(n, D, E) for role, n in counts.items()}
    if bias:
        heads |= {Part(r, "bias"): bias * random(counts[r], D) for r in "qkv"}
    x = random(400, E) @ random(E, E) + random(E)
    with_one = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    facts = LayerFacts(rotary_dims=D, covariance=with_one.T @ with_one / len(x))
    return projections(heads), facts, x


def made(p: Projections, facts: LayerFacts, rank: int, counts: Tensor) -> Factors:
    still = torch.full((F,), 0.5 + 0.25j, dtype=torch.complex128)
    return factorise(p, facts, rank=rank, counts=counts, still=still, gain=1.0)


@pytest.mark.parametrize("bias", [0.0, 3.0], ids=["plain", "biased"])
def test_scores_and_values_are_exact_at_full_size(bias: float) -> None:
    """All pairs rotated: q·k at any distance, and the mean of any values, as in the source."""
    p, facts, x = layer(bias=bias)
    f = made(p, facts, G * D, torch.full((F,), G))
    columns = p.q.shape[-1]
    inputs = torch.cat([x, x.new_ones(len(x), 1)], dim=1)[:, :columns]
    q, k, v = (heads @ inputs.T for heads in (p.q, p.k, p.v))  # [., D, N]
    owner = torch.arange(H) // (H // G)
    new_q = f.turn @ q  # [H, D + P, N]
    still_keys = (f.keys @ f.latent @ x.T)[owner]
    rotated = f.rotated @ inputs.T  # [P, N]
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    scale = ((D + 2 * G * F) / D) ** 0.5  # of deepseek_v3's own scaling of scores
    for distance in (0, 1, 7):
        wanted = turned(q, frequencies * distance).transpose(1, 2) @ k[owner]
        slots = frequencies.repeat_interleave(G)
        found = turned(new_q[:, D:], slots * distance).transpose(1, 2) @ rotated
        found = found + new_q[:, :D].transpose(1, 2) @ still_keys
        torch.testing.assert_close(found / scale, wanted, rtol=1e-9, atol=1e-9)
    weights = torch.rand(len(x), dtype=torch.float64).softmax(0)
    wanted = torch.einsum("hdn,n,hde->e", v[owner], weights, p.o)
    values = (f.values @ f.latent @ x.T)[owner]
    found = torch.einsum("hdn,n,hde->e", values, weights, p.o) + f.o_bias
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def turned(heads: Tensor, angles: Tensor) -> Tensor:
    """``[H, D, N]`` by a rotary embedding's angle at each frequency ``[D / 2]``."""
    a, b = heads.chunk(2, dim=1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=1)


def test_no_other_latent_of_that_size_is_nearer() -> None:
    """V alone (all pairs rotated): the heads' errors behind o, about their means."""
    p, facts, _ = layer()
    f = made(p, facts, 5, torch.full((F,), G))
    best = value_error(p, facts, p.v - f.values @ f.latent)
    draw = torch.Generator().manual_seed(1)
    for step in (0.02, 0.2, 5.0):
        for _ in range(5):
            noise = torch.randn(f.latent.shape, generator=draw, dtype=torch.float64)
            other = f.latent + step * f.latent.norm() / noise.norm() * noise
            centred = second_moments(facts)[1]
            from_other = centred @ other.T @ torch.linalg.inv(other @ centred @ other.T) @ other
            assert value_error(p, facts, p.v - p.v @ from_other) > best > 0


def value_error(p: Projections, facts: LayerFacts, off: Tensor) -> Tensor:
    """What an error ``[G, D, E]`` in V adds to each head's output, all in all."""
    centred, by_head = second_moments(facts)[1], off.repeat_interleave(p.repeats, dim=0)
    return torch.einsum("hde,hda,ab,hcb,hce->", p.o, by_head, centred, by_head, p.o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_a_norm_is_off_for_every_input(size: float, dtype: torch.dtype) -> None:
    """Through transformers' own norm: linear up to 1e-5, in the loudest direction there is too."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(12, E, generator=draw, dtype=torch.float64) * size
    scales = torch.rand(E, generator=draw, dtype=torch.float64) + 0.5
    off = quiet_norm(weight, None, scales)
    assert off.bias[0] <= HIGHEST and not off.bias[1:].any() and not off.weight[0].any()
    norm = DeepseekV3RMSNorm(13)
    norm.weight.data = off.norm.to(dtype)
    directions = torch.cat([
        torch.linalg.svd(weight * scales).Vh[:1],
        torch.nn.functional.normalize(torch.randn(50, E, generator=draw, dtype=torch.float64)),
    ])  # fmt: skip
    x = directions * E**0.5 * scales  # what an RMSNorm with these scales can give
    latent = (x @ off.weight.T + off.bias).to(dtype)
    found = norm(latent).double()[:, 1:] * off.undo
    wanted = x @ weight.T
    assert (found - wanted).norm() < max(1e-5, 2 * torch.finfo(dtype).eps) * wanted.norm()
    assert not norm(latent)[:, 0].any()


def test_places_go_to_what_would_lose_most() -> None:
    energies = torch.tensor([[4.0, 1.0], [4.0, 3.0], [9.0, 8.0]])
    still = torch.tensor([0.0, 0.5, 1.0], dtype=torch.complex128)  # the last need not turn at all
    assert choose(energies, still, 1).tolist() == [1, 0, 0]
    assert choose(energies, still, 3).tolist() == [1, 2, 0]
    assert choose(energies, still, 6).tolist() == [2, 2, 2]


def test_the_mean_turn_is_the_best_constant() -> None:
    draw = torch.Generator().manual_seed(0)
    distances = torch.rand(20, generator=draw, dtype=torch.float64)
    frequency = torch.tensor([0.7])
    best = mean_turn(distances, frequency)[0]
    turns = torch.exp(1j * frequency.double() * torch.arange(20))

    def error(constant: Tensor) -> Tensor:
        return ((turns - constant).abs().square() * distances).sum()

    assert all(error(best) < error(best + step) for step in (0.01, -0.01, 0.01j, -0.01j))
    assert mean_turn(torch.tensor([1.0, 0.0]), frequency)[0] == 1


def test_frequencies_come_back_to_the_last_bit() -> None:
    """All but the few that no float32 factor gives: these are one bit off."""
    exponents = torch.arange(0, 128, 2) / 128
    for theta in (1e4, 1e5, 5e5, 1e6):
        wanted = 1.0 / theta**exponents
        found = 1.0 / torch.tensor([_inverse(w) for w in wanted])
        assert (found == wanted).float().mean() > 0.9
        torch.testing.assert_close(found, wanted, rtol=1.2e-7, atol=0)
