"""A lower layer never imports a higher one: read from the source, not from what happens to run."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ijepa_zoo"

# the longest entry that a module's name begins with tells its layer
LAYERS = {
    "seeds": 0,
    "masks": 0,
    "models.positions": 0,
    "weights.catalog": 0,
    "weights.safetensors_file": 0,
    "train.schedules": 0,
    "models": 0,  # the packages themselves: a docstring at most
    "weights": 0,
    "data": 1,
    "processes": 1,
    "progress": 1,
    "rendezvous": 1,
    "models.encoder": 1,
    "models.predictor": 1,
    "models.predictor_blocks": 1,
    "weights.layouts": 1,
    "weights.config": 1,
    "weights.torch_file": 1,
    "weights.ranged": 1,
    "weights.download": 1,
    "weights.fetch": 1,
    "weights.networks": 1,
    "weights.read": 1,
    "weights.load": 1,
    "models.jepa": 2,
    "models.factory": 2,
    "weights.bundle": 2,
    "weights.card": 2,
    "weights.writers": 2,
    "weights.export": 2,
    "features": 2,
    "extraction": 2,
    "pictures": 2,
    "train": 3,
    "eval": 3,
    "serving": 3,
    "cli": 4,
    "": 4,  # ijepa_zoo itself
}
# packages whose modules are all of one layer
WHOLE = {"data", "extraction", "train", "eval", "serving", "cli"}
GROUND = {"torch", "numpy"} | sys.stdlib_module_names  # all that layer 0 may import
PROCESS_GROUPS = {
    *("processes", "rendezvous", "train.parallel", "train.checkpoint"),
    "extraction.ranks",
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    .removesuffix("__init__")
    .rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def _layer(module):
    if module in LAYERS:
        return LAYERS[module]
    package = module.partition(".")[0]
    return LAYERS[package] if package in WHOLE else None


def _resolve(module, path, node):
    """Absolute name that `from X import ...` means."""
    if not node.level:
        return node.module
    parts = ["ijepa_zoo", *module.split(".")] if module else ["ijepa_zoo"]
    if path.name != "__init__.py":
        parts = parts[:-1]
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _imports(module, path):
    """Absolute names of all that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _resolve(module, path, node)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def _own(names):
    """Those that are modules of this package; a package counts where nothing below it does."""
    found = {name.removeprefix("ijepa_zoo").lstrip(".") for name in names if _is_own(name)}
    found &= MODULES.keys()
    return {n for n in found if not any(o != n and o.startswith(f"{n}.") for o in found) or not n}


def _is_own(name):
    return name == "ijepa_zoo" or name.startswith("ijepa_zoo.")


GRAPH = {module: _own(_imports(module, path)) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_nothing_above_its_layer(module):
    layer = _layer(module)
    assert layer is not None, (
        f"ijepa_zoo.{module} is in no layer: give it one in LAYERS of tests/test_layers.py"
    )
    above = {other: _layer(other) for other in GRAPH[module] if (_layer(other) or 0) > layer}
    assert not above, f"ijepa_zoo.{module} is of layer {layer} and imports {above}"


def test_layers_name_no_module_that_is_gone():
    assert LAYERS.keys() <= MODULES.keys()


def test_lowest_layer_stands_on_torch_numpy_and_the_standard_library():
    for module, path in MODULES.items():
        if _layer(module) == 0:
            others = {name.partition(".")[0] for name in _imports(module, path)}
            assert others <= GROUND | {"ijepa_zoo"}, module


def test_training_and_evaluation_never_import_each_other():
    for module, imported in GRAPH.items():
        for one, other in (("train", "eval"), ("eval", "train")):
            if module.partition(".")[0] == one:
                assert not any(name.partition(".")[0] == other for name in imported), module


def test_process_groups_are_touched_in_few_places_and_never_in_models():
    for module, path in MODULES.items():
        names = set(_imports(module, path))
        if any(n == "torch.distributed" or n.startswith("torch.distributed.") for n in names):
            assert module in PROCESS_GROUPS, module


def test_no_two_modules_import_each_other_in_a_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(GRAPH[module]):
                visit(other)
            path.pop()
            done.add(module)

    for module in GRAPH:
        visit(module)


def test_names_of_files_say_what_is_in_them():
    vague = {"utils", "helpers", "common", "misc", "util", "helper"}
    assert not [m for m in MODULES if vague & set(m.split("."))]
