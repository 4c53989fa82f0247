"""Reaction SMILES for a masked language model of chemistry: put together from building blocks.

A carrier has a place `*` for a group; groups begin with the atom that is bound there.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

# An atom in brackets, an atom or sign of two characters, a ring number of three, or one character.
SMILES_TOKEN = r"\[[^\]]+\]|Br|Cl|>>|%\d\d|."

MASKED = 0.15  # share of tokens, as such models are trained with

# fmt: off
CARRIERS = (
    "CC*", "CC(C)*", "CCCC*", "COCC*", "C1CCC(*)CC1", "c1ccc(*)cc1", "Cc1ccc(*)cc1",
    "COc1ccc(*)cc1", "Fc1ccc(*)cc1", "Clc1ccc(*)cc1", "Brc1ccc(*)cc1", "N#Cc1ccc(*)cc1",
    "Cc1cccc(*)c1", "COc1cccc(*)c1", "Fc1cccc(*)c1", "Clc1cccc(*)c1", "Cc1ccccc1*", "Clc1ccccc1*",
    "FC(F)(F)c1ccc(*)cc1", "CC(C)(C)c1ccc(*)cc1", "COc1ccc(*)cc1OC", "Clc1ccc(*)cc1Cl",
    "c1ccc2cc(*)ccc2c1", "c1cncc(*)c1", "c1cc(*)ccn1", "c1csc(*)c1", "c1ccc(C*)cc1",
    "COc1ccc(C*)cc1", "Fc1ccc(C*)cc1", "COC(=O)c1ccc(*)cc1",
)
AMINES = (
    "N(C)C", "NCC", "NCCC", "NC(C)C", "NCCO", "NCCOC", "NCC(C)C", "NC1CC1", "NC1CCCCC1",
    "N1CCCC1", "N1CCCCC1", "N1CCOCC1", "N1CCN(C)CC1", "NCc1ccccc1", "NCc1ccc(F)cc1",
    "NCc1ccc(OC)cc1", "NCCc1ccccc1", "Nc1ccccc1", "Nc1ccc(Cl)cc1", "Nc1ccc(C)cc1", "Nc1cccnc1",
    "NCC(=O)OC", "N(C)Cc1ccccc1", "Nc1ccc(OC)cc1",
)
ALKYLS = (
    "C", "CC", "CCC", "C(C)C", "CC=C", "CC#N", "CC(=O)OC", "CC(=O)OCC", "CCOC", "CC1CC1",
    "Cc1ccccc1", "Cc1ccc(F)cc1", "Cc1ccc(Cl)cc1", "Cc1ccc(OC)cc1", "Cc1cccnc1",
)
# fmt: on


@dataclass(frozen=True)
class Kind:
    """A kind of reaction: what the carrier and the group are, with what, and what comes of them."""

    groups: tuple[str, ...]
    carrier: str  # what stands at *
    group: str  # + the group: a molecule of its own; "" when the group is none
    product: str  # what stands at * afterwards; + the group
    others: str  # reagents and solvents


KINDS = (
    Kind(AMINES, "C(=O)O", "{}", "C(=O){}", "CCN=C=NCCCN(C)C.CN(C)C=O.Cl"),
    Kind(AMINES, "C(=O)Cl", "{}", "C(=O){}", "CCN(CC)CC.ClCCl"),
    Kind(AMINES, "S(=O)(=O)Cl", "{}", "S(=O)(=O){}", "ClCCl.c1ccncc1"),
    Kind(AMINES, "C=O", "{}", "C{}", "CO.[BH3-]C#N.[Na+]"),
    Kind(AMINES, "CBr", "{}", "C{}", "CC#N.O=C([O-])[O-].[K+].[K+]"),
    Kind(ALKYLS, "O", "Br{}", "O{}", "CN(C)C=O.O=C([O-])[O-].[K+].[K+]"),
    Kind(ALKYLS, "O", "O{}", "O{}", "C1CCOC1.CCOC(=O)N=NC(=O)OCC.c1ccc(P(c2ccccc2)c2ccccc2)cc1"),
    Kind(ALKYLS, "C(=O)O", "O{}", "C(=O)O{}", "O=S(=O)(O)O"),
    Kind(ALKYLS, "C(=O)O{}", "", "C(=O)O", "C1CCOC1.O.[Li+].[OH-]"),
    Kind(AMINES, "C(=O){}", "", "C{}", "C1CCOC1.[Al+3].[H-].[H-].[H-].[H-].[Li+]"),
)


def composed(count: int, seed: int) -> tuple[list[str], list[str]]:
    """(to calibrate on, held out): `count` of the first, a tenth of that of the second.

    They share no carrier: every fifth is held out.
    """
    draw = random.Random(seed)
    held_out = set(CARRIERS[4::5])
    kept = [carrier for carrier in CARRIERS if carrier not in held_out]
    found = []
    for carriers, wanted in ((kept, count), (sorted(held_out), count // 10)):
        pairs = itertools.product(carriers, KINDS)
        every = [reaction(c, kind, group) for c, kind in pairs for group in kind.groups]
        found.append(draw.sample(every, min(wanted, len(every))))
    return found[0], found[1]


def reaction(carrier: str, kind: Kind, group: str) -> str:
    molecules = [put(carrier, kind.carrier.format(group)), *kind.others.split(".")]
    if kind.group:
        molecules.append(kind.group.format(group))
    return ".".join(sorted(molecules)) + ">>" + put(carrier, kind.product.format(group))


def put(carrier: str, group: str) -> str:
    """A carrier with the group in its place; the group's rings get numbers of their own."""
    rings = max((int(d) for d in re.findall(r"\d", carrier)), default=0)
    group = re.sub(r"(?<=[A-Za-z])\d", lambda m: str(int(m[0]) + rings), group)
    return carrier.replace("*", group)


def as_trained(reactions: list[str], seed: int) -> str:
    """Lines as the model sees reactions in training: between its special tokens, partly masked."""
    draw = random.Random(seed)

    def masked(reaction: str) -> str:
        tokens = re.findall(SMILES_TOKEN, reaction)
        return "".join("[MASK]" if draw.random() < MASKED else token for token in tokens)

    return "\n".join(f"[CLS]{masked(reaction)}[SEP]" for reaction in reactions)
