"""Recipes, YAML files and changes such as `optim.lr=5e-4`, read into a `PretrainConfig`."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import SettingsError
from . import official
from .config import PretrainConfig, Section

_RECIPES = Path(__file__).with_name("recipes")
_FREE = ("log.", "runtime.", "data.max_broken")  # no weight depends on these
_RENAMED = {"machine": "runtime", "mask.cut": "mask.group_size"}  # names of version 0.1


def recipes() -> list[str]:
    """Names of the recipes of the package."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def recipe_table() -> list[tuple[str, str]]:
    """Name and purpose, in a line, of every recipe."""
    texts = [(name, _recipe_file(name).read_text(encoding="utf-8")) for name in recipes()]
    return [(name, text.partition("\n")[0].removeprefix("#").strip()) for name, text in texts]


def load_config(
    recipe_or_file: str | Path, overrides: Sequence[str] = (), world: int = 1
) -> PretrainConfig:
    """Settings of a run.

    Args:
        recipe_or_file: The name of a recipe (see `recipes`), or a YAML file: your own, which may
            start from a recipe with the line `recipe: NAME`, or one of the official repository.
        overrides: Changes, such as `optim.lr=5e-4`, `mask.target_scale=0.1,0.2` or
            `optim.duration=100 epochs`.
        world: Number of processes; the official repository's files give the batch of one of them.

    Raises:
        SettingsError: There is no such recipe or file, or a setting is unknown or wrong.
        OSError: The file cannot be read.
    """
    if recipe_or_file in recipes():
        path = _recipe_file(str(recipe_or_file))
    elif (path := Path(recipe_or_file)).suffix not in (".yaml", ".yml") and not path.is_file():
        raise SettingsError(_no_recipe(str(recipe_or_file)))
    tree = _tree(_read(path), str(path), world)
    for change in overrides:
        tree = _merged(tree, _change(change))
    return _validated(tree)


def parse(text: str, origin: str) -> PretrainConfig:
    """Settings from the text of a YAML file; what it leaves out stays at the defaults.

    Args:
        text: The file's text.
        origin: The file's name, for messages.

    Raises:
        SettingsError: It is not YAML, or a setting is unknown or wrong.
    """
    return _validated(_tree(_content(text, origin), origin, world=1))


def override(config: PretrainConfig, *changes: str, **values: Any) -> PretrainConfig:
    """Settings with some of them changed.

    Args:
        config: Settings; they stay as they are.
        *changes: Texts as on the command line: `optim.lr=5e-4`.
        **values: Values by name: `override(config, **{"optim.lr": 5e-4})`.

    Raises:
        SettingsError: A setting is unknown or wrong.
    """
    tree = config.model_dump()
    for change in changes:
        tree = _merged(tree, _change(change))
    return _validated(_merged(tree, _nested(values)))


def official_folders(file: str | Path) -> tuple[str, str] | None:
    """Folders of images and of the run in a YAML file of the official repository, else None.

    Raises:
        SettingsError: It is not YAML, or lacks settings.
    """
    content = _read(Path(file))
    return official.folders(content, str(file)) if official.is_official(content) else None


def dump(config: PretrainConfig) -> str:
    """All settings as YAML; `parse` gives the same settings back."""
    tree = config.model_dump()
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=10**6)


def explained(config: PretrainConfig) -> str:
    """All settings as YAML, their meaning as comments; `parse` gives the same settings back."""
    lines: list[str] = []
    section: Section = config
    for line in dump(config).splitlines():
        name, indent = line.strip().partition(":")[0], line[: -len(line.lstrip())]
        value = getattr(section if indent else config, name)
        if isinstance(value, Section):
            section, meaning = value, type(value).__doc__
            lines.append("")
        else:
            owner = section if indent else config
            meaning = type(owner).model_fields[name].description
        lines += [f"{indent}# {row}" for row in textwrap.wrap(meaning or "", 96)]
        lines.append(line)
    return "\n".join(lines) + "\n"


def differences(before: PretrainConfig, now: PretrainConfig, result_only: bool = True) -> list[str]:
    """What differs between two runs' settings: `optim.lr: 0.001 then, 0.0005 now`.

    Args:
        before: Earlier settings.
        now: Those of today.
        result_only: Leave out what may change on resume.
    """
    then = named_values(before)
    return [
        f"{name}: {then[name]} then, {value} now"
        for name, value in named_values(now).items()
        if then[name] != value and not (result_only and name.startswith(_FREE))
    ]


def named_values(config: PretrainConfig) -> dict[str, Any]:
    """Every value by its full name, such as `optim.lr`."""
    values: dict[str, Any] = {}
    for name, value in config.model_dump().items():
        if isinstance(value, dict):
            values |= {f"{name}.{leaf}": part for leaf, part in value.items()}
        else:
            values[name] = value
    return values


class _Dumper(yaml.SafeDumper):
    """Writes the numbers of a tuple in one line."""

    def numbers(self, data: tuple[float, ...]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(tuple, _Dumper.numbers)


class _Loader(yaml.SafeLoader):
    """Reads `5e-4` as a number, as YAML 1.2 does, and refuses a name that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _load(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # a wrong value of a tag, as in `!!bool x`, is no YAMLError
        raise SettingsError(f"{origin} is not YAML: {error}") from None


def _content(text: str, origin: str) -> dict[str, Any]:
    content = _load(text, origin) or {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"{origin} must hold names and values, such as `seed: 0`")
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        return _content(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not a text file: {error}") from None


def _tree(content: dict[str, Any], origin: str, world: int) -> dict[str, Any]:
    """Settings of a file by section, together with those of the recipe that it names."""
    if official.is_official(content):
        return _nested(official.translate(content, origin, world))
    recipe = content.pop("recipe", None)
    if recipe is None:
        return _merged({}, content)
    if recipe not in recipes():
        raise SettingsError(f"{origin}: {_no_recipe(str(recipe))}")
    file = _recipe_file(recipe)
    return _merged(_tree(_read(file), str(file), world), content)


def _change(text: str) -> dict[str, Any]:
    """`optim.lr=5e-4` as `{"optim": {"lr": 5e-4}}`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"{text!r} changes nothing: write {text}=VALUE")
    try:
        return _nested({name.strip(): _load(value, text)})
    except SettingsError:
        return _nested({name.strip(): value})


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"optim.lr": 1}` as `{"optim": {"lr": 1}}`."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, dot, leaf = name.partition(".")
        tree = _merged(tree, {section: {leaf: value}} if dot else {name: value})
    return tree


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the values of `changes`; an empty section changes nothing."""
    merged = dict(tree)
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = {**merged[name], **value}
        elif value is not None or name not in PretrainConfig.model_fields:
            merged[name] = value
    return merged


def _validated(tree: Mapping[str, Any]) -> PretrainConfig:
    try:
        return PretrainConfig.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    """What is wrong with the first wrong setting."""
    errors = error.errors()
    location = errors[0]["loc"][:2]
    name, kind = ".".join(map(str, location)), errors[0]["type"]
    if kind == "extra_forbidden":
        return _unknown(name)
    if kind == "model_type":
        return f"{name} is a section of settings: use {name}.NAME=VALUE"
    messages = [e["msg"].removeprefix("Value error, ") for e in errors if e["loc"][:2] == location]
    if kind == "value_error" and isinstance(errors[0]["input"], (Mapping, Section)):
        return messages[0]  # about several settings, which it names
    text = " or ".join(f"{text[0].lower()}{text[1:]}" for text in dict.fromkeys(messages))
    return f"{name} is {errors[0]['input']!r:.80}: {text}"


def _unknown(name: str) -> str:
    if name in _RENAMED:
        return f"there is no setting {name}: since version 0.2 it is {_RENAMED[name]}"
    known = {full.rpartition(".")[2]: full for full in named_values(PretrainConfig())}
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    if near:
        return f"there is no setting {name}: did you mean {known[near[0]]}?"
    section = getattr(PretrainConfig(), name.partition(".")[0], PretrainConfig())
    return f"there is no setting {name}: use one of {', '.join(type(section).model_fields)}"


def _recipe_file(name: str) -> Path:
    return _RECIPES / f"{name}.yaml"


def _no_recipe(name: str) -> str:
    near = difflib.get_close_matches(name, recipes(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(recipes())}"
    return f"there is no recipe or file {name!r}: {hint}"
