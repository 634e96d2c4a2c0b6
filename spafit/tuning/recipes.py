"""Recipes: where a search starts for a kind of task, as data that people edit, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from spafit.errors import ConfigError, UsageError
from spafit.fields import FieldError, integer, text
from spafit.settings import TrainSettings
from spafit.tuning.space import SearchSpace
from spafit.yaml_fields import entries, mapping, read_fields

TYPES = ("classification", "regression", "generation")


@dataclass(frozen=True)
class Recipe:
    """A starting point.

    Attributes:
        name: of the recipe.
        when: conditions, all of which hold: ``items`` (least, and below most), ``type``, ``paired``.
        space: fields of :class:`SearchSpace`.
        settings: fields of :class:`TrainSettings`.
        folds: of the cross-validation.
        trials: of the search.
        seeds: that confirm the best trial.
        source: where it comes from.
    """

    name: str
    when: Mapping[str, Any]
    space: Mapping[str, Any]
    settings: Mapping[str, Any]
    folds: int
    trials: int
    seeds: int
    source: str

    def fits(self, *, items: int, kind: str, paired: bool) -> bool:
        """Whether every condition holds."""
        least, most = self.when.get("items", (0, float("inf")))
        return (
            least <= items < most
            and self.when.get("type", kind) == kind
            and bool(self.when.get("paired", paired)) == paired
        )

    def apply(self, space: SearchSpace) -> SearchSpace:
        """The space with the recipe's fields."""
        return space.with_fields(self.space)


def read_recipes(path: str | Path | None = None) -> tuple[Recipe, ...]:
    """The recipes of a file, by default the shipped ones.

    Raises:
        ConfigError: the file cannot be read, or a field is wrong; names file, line and field.
    """
    place = Path(str(files("spafit") / "tuning" / "recipes.yaml")) if path is None else Path(path)
    try:
        source = place.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The recipes {place} cannot be read: {error.strerror}. Give a YAML file.") from error
    return read_fields(source, file=str(place), what="recipes", build=lambda content, _: _recipes(content))


def recipe_for(
    *, items: int, kind: str, paired: bool, name: str | None = None, path: str | Path | None = None
) -> Recipe:
    """The recipe of that name, or the first whose conditions hold.

    Args:
        items: training items.
        kind: one of :data:`TYPES`.
        paired: whether items have two texts.
        name: of a recipe; None chooses by the task.
        path: of a file of recipes.

    Raises:
        UsageError: no such recipe, or none that fits.
        ConfigError: as :func:`read_recipes`.
    """
    known = read_recipes(path)
    for recipe in known:
        if recipe.name == name or (name is None and recipe.fits(items=items, kind=kind, paired=paired)):
            return recipe
    names = ", ".join(r.name for r in known)
    raise UsageError(
        f"There is no recipe {name!r}. Recipes: {names}." if name is not None
        else f"No recipe fits {items} items of {kind}. Recipes: {names}. Add one, or give a space."
    )  # fmt: skip


def _recipes(content: Any) -> tuple[Recipe, ...]:
    top = mapping(content, (), ("schema_version", "recipes"), (), None)
    fields = ("name", "when", "space", "settings", "folds", "trials", "seeds", "source")
    found = []
    for i, entry in enumerate(entries(top["recipes"], ("recipes",))):
        path = ("recipes", i)
        got = mapping(entry, path, fields, (), None)
        when = mapping(got["when"], (*path, "when"), (), ("items", "type", "paired"), None)
        if "type" in when and when["type"] not in TYPES:
            raise FieldError((*path, "when", "type"), f"got {when['type']!r}; write {', '.join(TYPES)}.")
        if "items" in when and (len(entries(when["items"], (*path, "when", "items"))) != 2):
            raise FieldError((*path, "when", "items"), "write [least, most].")
        try:
            TrainSettings(**mapping(got["settings"], (*path, "settings"), (), tuple(TrainSettings().to_dict()), None))
            SearchSpace({"encoder": 12}).with_fields(got["space"])
        except FieldError as error:
            raise FieldError((*path, "space", *error.path), error.sentence) from None
        except UsageError as error:
            raise FieldError((*path, "settings"), str(error)) from None
        numbers = {k: integer(got[k], (*path, k), minimum=1) for k in ("folds", "trials", "seeds")}
        said = " ".join(text(got["source"], (*path, "source")).split())
        name = text(got["name"], (*path, "name"))
        found.append(Recipe(name, when, got["space"], got["settings"], **numbers, source=said))
    return tuple(found)
