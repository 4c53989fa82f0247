"""Latents as the form of a result: see `..work.Form`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..families.layouts import LayerHeads, Part, Place
from ..heads.layer import architectures_after, layer_facts, read_layer
from ..io.reading import load_config
from ..io.safetensors_reader import FLOAT_DTYPES, TensorInfo
from ..merge.affine import projections
from ..merge.method import LayerFacts, Method
from .deepseek import Sizes, config_of, stored
from .factors import Pairs, factorise, score_reach, second_moments
from .rotation import Rotation, choose, mean_turn

if TYPE_CHECKING:
    from ..calibration.source_model import SourceModel
    from ..calibration.statistics import Measured
    from ..conversion import Work


@dataclass(frozen=True)
class Latents:
    """The form of a result that caches one latent and one rotated key for all heads."""

    method: Method
    sizes: Sizes
    rotation: Rotation | None = None  # None until it is `informed`

    def tensors(self, work: Work, place: Place, info: TensorInfo) -> list[TensorInfo]:
        if place.kind != "weight":
            return []
        (role,) = place.slot.roles
        prefix = info.name.removesuffix(f"{place.slot.module}.weight")
        shapes = self.sizes.shapes(role)
        return [TensorInfo(prefix + own, info.dtype, shape) for own, shape in shapes.items()]

    def names(self, work: Work, layer: int) -> dict[str, str]:
        return {own: info.name for own, info in self._infos(work, layer).items()}

    def _infos(self, work: Work, layer: int) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for name, place in work.places_of(layer).items():
            new = self.tensors(work, place, work.source.shard_of(name).tensors[name])
            prefix = name.removesuffix(f"{place.slot.module}.{place.kind}")
            found |= {info.name.removeprefix(prefix): info for info in new}
        return found

    def config(self, work: Work) -> dict[str, Any]:
        assert self.rotation is not None
        known = load_config(work.source.folder)
        config = config_of(work.source.config, known, self.sizes, self.rotation)
        return config | architectures_after(work)

    def layer(
        self, work: Work, layer: int, heads: LayerHeads, facts: LayerFacts
    ) -> dict[str, Tensor]:
        assert self.rotation is not None
        factors = factorise(
            projections(heads),
            facts,
            rank=self.sizes.rank - 1,
            counts=self.rotation.counts,
            still=self.rotation.still,
            gain=self.rotation.gain.item(),
        )
        bias = heads.get(Part("q", "bias"))
        found = stored(
            self.sizes,
            factors,
            q=heads[Part("q", "weight")].double(),
            q_bias=None if bias is None else bias.double(),
            o=heads[Part("o", "weight")].double(),
            o_bias=self._beside(work, layer, "self_attn.o_proj.bias"),
            scales=self._scales(work, layer),
        )
        infos = self._infos(work, layer)
        assert {own: tuple(x.shape) for own, x in found.items()} == {
            own: info.shape for own, info in infos.items()
        }
        return {
            info.name: found[own].to(FLOAT_DTYPES[info.dtype]).contiguous()
            for own, info in infos.items()
        }

    def _scales(self, work: Work, layer: int) -> Tensor:
        found = self._beside(work, layer, "input_layernorm.weight")
        if found is None:
            raise ValueError(f"layer {layer} has no input_layernorm.weight: not a llama layer")
        return found

    @staticmethod
    def _beside(work: Work, layer: int, own: str) -> Tensor | None:
        """A tensor of the source by its path below the layer, in float64."""
        name, place = next(iter(work.places_of(layer).items()))
        wanted = name.removesuffix(f"{place.slot.module}.{place.kind}") + own
        held = any(wanted in shard.tensors for shard in work.source.shards)
        return work.source.read(wanted).double() if held else None

    def survey(
        self, work: Work, source: SourceModel, layers: Iterable[Measured]
    ) -> dict[str, Tensor]:
        rotary: Any = source.model.get_submodule(work.target.rotary_path)
        frequencies = rotary.inv_freq.float().cpu()
        if len(frequencies) * 2 != self.sizes.dim:
            raise ValueError(
                f"{work.plan.source} rotates {len(frequencies) * 2} of {self.sizes.dim} dimensions "
                "of a head; possible: all. Convert its KV heads instead: --num-key-value-heads"
            )
        gain = float(rotary.attention_scaling) ** 2
        energies, distances = torch.zeros(()), torch.zeros(())
        for seen in layers:
            facts = seen.facts(layer_facts(work, seen.layer))
            p = projections(read_layer(work, seen.layer))
            energy = Pairs.of(p, facts, score_reach(p, second_moments(facts)[1], gain)).energy
            energies = energies + energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
            distances = distances + seen.distances
        still = mean_turn(distances, frequencies)
        counts = choose(energies, still, self.sizes.rope // 2)
        return Rotation(
            frequencies, counts, still, torch.tensor(gain, dtype=torch.float64)
        ).tensors()

    def informed(self, survey: Mapping[str, Tensor]) -> Latents:
        return replace(self, rotation=Rotation.of(survey))
