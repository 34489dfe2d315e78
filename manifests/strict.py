"""Frozen pydantic models that refuse unknown keys and name the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from manifests import paths
from manifests.errors import UserError


class Strict(BaseModel):
    """Base of everything that is read from a file a person wrote.

    `location_fields` name the fields that say where data lies, not what it is: they do not enter
    a stage's fingerprint (the data's own identity does), so a moved folder is still reused. Models
    in a field, or in a list or mapping of them, name their own. A field whose key is no Python name
    has an alias.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True
    )
    location_fields: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def load(cls, values: Any, *, where: str) -> Self:
        """Return the validated model; `where` names the place for the error, e.g. "recipe.dedup".

        Raises: UserError for an unknown key (with the nearest valid one) or a wrong value.
        """
        if not isinstance(values, Mapping):
            raise UserError(
                f"{where} should be a mapping, not {_shown(values)}.",
                fix=f"Write it as keys and values; known keys: {', '.join(_keys(cls))}.",
            )
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _as_user_error(cls, error, where) from error

    def located(self) -> Self:
        """Return the same config with absolute locations: a worker may run in another folder."""
        found = {
            name: _absolute(value) if name in self.location_fields else _located(value)
            for name, value in self
        }
        return self.model_copy(update=found)

    def canonical(self) -> dict[str, Any]:
        """Return the JSON-ready values that decide the result: all fields but the locations."""
        values = self.model_dump(mode="json", exclude=set(self.location_fields), by_alias=False)
        return {name: _canonical(getattr(self, name), values[name]) for name in values}


def _located(value: Any) -> Any:
    """Return the value with each model in it located."""
    if isinstance(value, Strict):
        return value.located()
    return _mapped(_located, value)


def _canonical(value: Any, dumped: Any) -> Any:
    """Return `dumped`, the JSON-ready form of `value`, with each model in it canonical."""
    if isinstance(value, Strict):
        return value.canonical()
    if isinstance(value, Mapping):
        return dict(zip(dumped, map(_canonical, value.values(), dumped.values()), strict=True))
    if isinstance(value, list | tuple):
        return list(map(_canonical, value, dumped))
    return dumped


def _absolute(value: Any) -> Any:
    """Return the value with each path in it absolute, in lists and mappings too."""
    if isinstance(value, str):
        return paths.absolute(value)
    return _mapped(_absolute, value)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return a list, tuple or mapping with each of its values changed, or any other as it is."""
    if isinstance(value, Mapping):
        return {key: change(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(change(one) for one in value)
    return value


def _keys(cls: type[Strict]) -> list[str]:
    """Return the keys as people write them."""
    return [field.alias or name for name, field in cls.model_fields.items()]


def nearest(name: str, known: list[str]) -> str | None:
    """Return the known name most like `name`, or None when none is alike.

    Example: nearest("similarity_abov", ["keep", "similarity_above"]) -> "similarity_above"
    """
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return found[0] if found else None


def unknown_key(name: str, known: list[str], *, where: str) -> UserError:
    """Return the error for a key that nobody reads."""
    guess = nearest(name, known)
    fix = f"Did you mean {guess!r}?" if guess else "Remove it."
    return UserError(f"{where}.{name} is unknown.", f"Known keys: {', '.join(known)}.", fix)


class MissingField(ValueError):
    """Raised by a validator for a field that only some models of its class need."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is missing")
        self.name = name


def _as_user_error(cls: type[Strict], error: ValidationError, where: str) -> UserError:
    first = error.errors(include_url=False)[0]
    path = [str(step) for step in first["loc"]]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, MissingField):
        path.append(cause.name)
    if first["type"] == "extra_forbidden":
        owner = _owner(cls, path[:-1])
        return unknown_key(path[-1], _keys(owner), where=".".join([where, *path[:-1]]))
    name = ".".join([where, *path])
    if first["type"] == "missing" or isinstance(cause, MissingField):
        return UserError(f"{name} is missing.", "It has no default.", f"Add {path[-1]}: ...")
    fix = "Correct the value."
    if first["type"] == "list_type" and isinstance(first["input"], str):
        fix = f"Write a list: {path[-1]}: [{first['input']}]."
    return UserError(f"{name} is {_shown(first['input'])}.", f"{first['msg']}.", fix)


def _owner(cls: type[Strict], path: list[str]) -> type[Strict]:
    steps = iter(path)
    for step in steps:
        field = cls.model_fields.get(step)
        named = field.annotation if field else None
        for inner in (named, *get_args(named)):  # X, X | None, list[X], dict[str, X]
            if isinstance(inner, type) and issubclass(inner, Strict):
                cls = inner
                if get_origin(named) is dict:
                    next(steps, None)  # the key, which may be called like a field
    return cls


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
