"""Recipes: a claim, the arms that test it, and when it counts as reproduced; one YAML file each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from opd_lightning import configfiles
from opd_lightning.inspect.reproduce import gradients, pairs, probes, tables, training
from opd_lightning.inspect.reproduce.arms import Arm, Networks
from opd_lightning.inspect.reproduce.criteria import Criterion

NETWORKS = "networks"
"""The file that is no recipe, but names the networks that recipes begin with."""
KEYS = {"run", "common", "arms", "passes_if", "seeds", "draw", "over", "note", "networks"}
LEAST_SEEDS = 3


@dataclass(frozen=True)
class Recipe:
    """A claim and how it is tested.

    Attributes:
        name: of the file, e.g. ``r1_success``.
        title: the claim, in a sentence.
        source: where it was made.
        arms: what is run, each with every seed.
        criteria: it is reproduced if all of them hold.
        seeds: of the recipe; more can be asked for.
        draw: curves that the figure shows.
        over: what they are drawn over.
        note: what a reader must know beside the figures.
        networks: of its own, beside the shipped ones.
        file: the YAML.
    """

    name: str
    title: str
    source: str
    arms: dict[str, Arm]
    criteria: tuple[Criterion, ...]
    seeds: tuple[int, ...]
    draw: tuple[str, ...]
    over: str
    note: str
    networks: dict[str, Arm]
    file: Path


def files() -> dict[str, Path]:
    """Name -> file of every shipped recipe."""
    return {f.stem: f for f in sorted(configfiles.recipes_folder().glob("*.yaml"), key=_order) if f.stem != NETWORKS}


def _order(file: Path) -> tuple[str, int]:
    """r2 before r10: by the letters and the number in front."""
    head = file.stem.partition("_")[0]
    letters = head.rstrip("0123456789")
    return (letters != "r" and letters) or "", int(head.removeprefix(letters) or 0)


def find(name: str) -> Path:
    """The file of a recipe: its name, the part in front of the underscore (``R1``), or a file of one's own.

    Raises:
        FileNotFoundError: naming near ones.
    """
    known = files()
    if Path(name).suffix == ".yaml" and Path(name).is_file():
        return Path(name).resolve()
    for stem, file in known.items():
        if name.lower() in (stem, stem.partition("_")[0]):
            return file
    near = difflib.get_close_matches(name.lower(), [*known, *(stem.partition("_")[0] for stem in known)], 3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise FileNotFoundError(f"no recipe {name!r}.{hint} `opd reproduce --list` shows all; a file of your own ends in .yaml")


def load(file: Path) -> Recipe:
    """Read a recipe.

    Raises:
        ValueError: for a key, class, argument or criterion that is not understood, naming the file.
    """
    text = file.read_text(encoding="utf-8")
    comments = [line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")]
    source = next((c.removeprefix("Source: ") for c in comments if c.startswith("Source: ")), "")
    found = yaml.safe_load(text)
    try:
        if unknown := set(found) - KEYS:
            raise ValueError(f"unknown keys {', '.join(sorted(unknown))}; allowed are {', '.join(sorted(KEYS))}")
        arms = _arms(found)
        own = _arms({"arms": found.get("networks", {})})
        criteria = tuple(Criterion.of(text) for text in found["passes_if"])
        if strange := set().union(*(c.arms for c in criteria)) - set(arms):
            raise ValueError(f"passes_if speaks of {', '.join(sorted(strange))}; arms are {', '.join(arms)}")
    except (ValueError, KeyError, ArgumentError) as error:
        raise ValueError(f"{file}: {error}") from error
    seeds = tuple(found.get("seeds", range(LEAST_SEEDS)))
    draw = tuple(found.get("draw", ()))
    told = found.get("over", "optimizer steps"), found.get("note", "")
    return Recipe(file.stem, comments[0], source, arms, criteria, seeds, draw, *told, own, file)


def networks(folder: Path, recipes: Sequence[Recipe]) -> Networks:
    """The shipped networks and those of the recipes, below a folder.

    Raises:
        ValueError: if two of them have one name.
    """
    shipped = yaml.safe_load((configfiles.recipes_folder() / f"{NETWORKS}.yaml").read_text(encoding="utf-8"))
    found = _arms(shipped)
    for recipe in recipes:
        if twice := sorted(set(found) & set(recipe.networks)):
            raise ValueError(f"{recipe.file}: there is already a network called {twice[0]}")
        found |= recipe.networks
    return Networks(folder, found)


def _arms(found: dict[str, Any]) -> dict[str, Arm]:
    common = found.get("common", {})
    out = {}
    for name, own in found["arms"].items():
        given = {**common, **(own or {})}
        out[name] = _built(given.pop("run", found.get("run", "Training")), given, name)
    return out


def classes() -> dict[str, type[Arm]]:
    """Kinds of arms, by name."""
    modules = (training, pairs, probes, tables, gradients)
    return {
        c.__name__: c for m in modules for c in vars(m).values() if isinstance(c, type) and issubclass(c, Arm) and c is not Arm
    }


def _built(name: str, arguments: dict[str, Any], arm: str) -> Arm:
    known = classes()
    if name not in known:
        raise ValueError(f"arm {arm}: run: {name!r} is not among {', '.join(sorted(known))}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(known[name], "arm")
    made: Arm = parser.instantiate_classes(parser.parse_object({"arm": arguments}))["arm"]
    return made
