"""Recipes, one's own YAML files and `key=value` changes, read into a `PretrainConfig`.

Every setting has a name with its section: `optim.lr`, `mask.cut`, `seed`. What is unknown or of
another type is refused with the nearest name or the type wanted.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import SettingsError
from . import published
from .config import PretrainConfig
from .limits import check
from .values import convert, named_values, plain, setting_types, shown, wanted

__all__ = [
    "check",
    "differences",
    "dump",
    "explained",
    "load_config",
    "override",
    "parse",
    "published_places",
    "recipe_table",
    "recipes",
]

_RECIPES = Path(__file__).with_name("recipes")
# What may change when a run goes on, since no weight depends on it.
_FREE = ("log.", "machine.", "data.max_broken")


def recipes() -> list[str]:
    """Names of the recipes that the package brings."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def recipe_table() -> list[tuple[str, str]]:
    """Every recipe's name and, in a line, what it is for."""
    texts = [(name, _recipe_file(name).read_text(encoding="utf-8")) for name in recipes()]
    return [(name, text.partition("\n")[0].removeprefix("#").strip()) for name, text in texts]


def load_config(
    recipe_or_file: str | Path, overrides: Sequence[str] = (), world: int = 1
) -> PretrainConfig:
    """Settings of a run.

    Args:
        recipe_or_file: The name of a recipe (see `recipes`), or a YAML file: one's own, which may
            start from a recipe with the line `recipe: NAME`, or one of the published code.
        overrides: Changes, such as `optim.lr=5e-4`, `mask.target_scale=0.1,0.2` or
            `optim.duration=100 epochs`.
        world: Number of processes; the published code's files give the batch of one of them.

    Raises:
        ValueError: There is no such recipe, or a setting is unknown or impossible.
        OSError: The file cannot be read.
    """
    path = _find(recipe_or_file)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is no text file: {error}") from None
    config = override(parse(text, str(path), world), *overrides)
    check(config)
    return config


def override(config: PretrainConfig, *changes: str, **values: Any) -> PretrainConfig:
    """Settings with some of them changed.

    Args:
        config: Settings; they stay as they are.
        *changes: Texts as on the command line: `optim.lr=5e-4`.
        **values: Values by name: `override(config, **{"optim.lr": 5e-4})`.

    Raises:
        ValueError: A setting is unknown or of another type.
    """
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise SettingsError(f"{change!r} changes nothing; write {change}=VALUE")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            value = text
        config = _changed(config, {name.strip(): value}, change)
    return _changed(config, values, "override")


def parse(text: str, origin: str, world: int = 1) -> PretrainConfig:
    """Settings from the text of a YAML file; what it leaves out stays at the defaults.

    Args:
        text: The file's text.
        origin: The file's name, for messages.
        world: See `load_config`.

    Raises:
        ValueError: It is no YAML, or a setting is unknown or of another type.
    """
    content = _content(text, origin)
    if published.recognised(content):
        return _changed(PretrainConfig(), published.translate(content, origin, world), origin)
    base = PretrainConfig()
    if (recipe := content.pop("recipe", None)) is not None:
        if recipe not in recipes():
            raise SettingsError(f"{origin}: {_no_recipe(str(recipe))}")
        file = _recipe_file(recipe)
        base = parse(file.read_text(encoding="utf-8"), str(file))
    return _changed(base, _flat(content), origin)


def published_places(file: str | Path) -> published.Places | None:
    """Where a file of the published code says that images are; None for any other file.

    Raises:
        ValueError: It is no YAML, or lacks what the published code needs.
    """
    content = _content(Path(file).read_text(encoding="utf-8"), str(file))
    return published.places(content, str(file)) if published.recognised(content) else None


def dump(config: PretrainConfig) -> str:
    """All settings as YAML; `parse` gives the same settings back."""
    tree: dict[str, Any] = {}
    for name, value in named_values(config):
        value = convert(value, setting_types()[name])
        section, _, leaf = name.rpartition(".")
        target = tree.setdefault(section, {}) if section else tree
        target[leaf] = list(value) if isinstance(value, tuple) else value
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False)


def explained(config: PretrainConfig) -> str:
    """All settings as YAML, what they mean as comments; `parse` gives the same settings back."""
    lines = []
    for line in dump(config).splitlines():
        section = line.removesuffix(":")
        if is_dataclass(part := getattr(config, section, None)):
            text = inspect.getdoc(type(part)) or ""
            lines += ["", *(f"# {row}".rstrip() for row in text.splitlines())]
        lines.append(line)
    return "\n".join(lines) + "\n"


def differences(before: PretrainConfig, now: PretrainConfig, result_only: bool = True) -> list[str]:
    """What differs between two runs' settings: `optim.lr: 0.001 then, 0.0005 now`.

    Args:
        before: Earlier settings.
        now: Those of today.
        result_only: Leave out what may change when a run goes on.
    """
    then = dict(named_values(before))
    return [
        f"{name}: {shown(then[name])} then, {shown(value)} now"
        for name, value in named_values(now)
        if plain(then[name]) != plain(value) and not (result_only and name.startswith(_FREE))
    ]


class _Dumper(yaml.SafeDumper):
    """Writes sections line by line, and numbers of a list beside each other."""

    def numbers(self, data: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.numbers)


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            raise yaml.constructor.ConstructorError(
                problem=f"{', '.join(twice)} is given twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def _content(text: str, origin: str) -> dict[str, Any]:
    try:
        content = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{origin} is no YAML file: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"{origin} must hold names and values, such as `seed: 0`")
    return content


def _recipe_file(name: str) -> Path:
    return _RECIPES / f"{name}.yaml"


def _find(recipe_or_file: str | Path) -> Path:
    if recipe_or_file in recipes():
        return _recipe_file(str(recipe_or_file))
    path = Path(recipe_or_file)
    if path.is_dir():
        hint = f"; the settings of a run are in {path / 'config.yaml'}"
        raise SettingsError(f"{path} is a folder, not a YAML file or a recipe's name{hint}")
    if not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise SettingsError(f"there is no file {path}")
        raise SettingsError(_no_recipe(str(recipe_or_file)))
    return path


def _no_recipe(name: str) -> str:
    near = difflib.get_close_matches(name, recipes(), n=1)
    hint = f"did you mean {near[0]}? All" if near else "the recipes"
    return f"no recipe and no file is called {name!r}; {hint} are: {', '.join(recipes())}"


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as full names; an empty section changes nothing."""
    sections = {name.partition(".")[0] for name in setting_types() if "." in name}
    found: dict[str, Any] = {}
    for name, value in content.items():
        if name in sections and isinstance(value, Mapping):
            found |= {f"{name}.{leaf}": part for leaf, part in value.items()}
        elif not (name in sections and value is None):
            found[name] = value
    return found


def _changed(config: PretrainConfig, values: Mapping[str, Any], origin: str) -> PretrainConfig:
    for name, value in values.items():
        hint = setting_types().get(name)
        if hint is None:
            raise SettingsError(f"{origin}: there is no setting {name}; {_nearest(name)}")
        try:
            value = convert(value, hint)
        except ValueError:
            raise SettingsError(
                f"{origin}: {name} is {shown(value)}; it must be {wanted(name)}"
            ) from None
        section, _, leaf = name.rpartition(".")
        if section:
            value = replace(getattr(config, section), **{leaf: value})
        config = replace(config, **{section or leaf: value})
    return config


def _nearest(name: str) -> str:
    """What may have been meant: the same word in another section, or a similar one."""
    known = list(setting_types())
    section, leaf = name.partition(".")[0], name.rpartition(".")[2]
    own = [key for key in known if key.startswith(f"{section}.")]
    if name == section and own:
        return f"{name} is a section, with {', '.join(own)}"
    leaves = {key: key.rpartition(".")[2] for key in own or known}
    similar = difflib.get_close_matches(leaf, leaves.values(), n=3)
    near = [key for key in known if key.rpartition(".")[2] == leaf]
    near = near or [key for key in leaves if leaves[key] in similar]
    if near:
        return f"did you mean {' or '.join(near)}?"
    sections = sorted({f"{key.partition('.')[0]}.*" for key in known if "." in key})
    return f"there are {', '.join(own or ['seed', *sections])}"
