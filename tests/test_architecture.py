"""The floors of the house: imports point strictly downward, and each subject has one home."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import sync_splitbn

ROOT = Path(sync_splitbn.__file__).parent
LAUNCH = Path(__file__).parents[1] / "launch"
FLOORS = [
    {"__main__"},
    {"__init__"},
    {"convert", "diagnostics", "replicas"},
    {"_convertible"},
    {"layer"},
    {"_state"},
    {"assignment", "functional", "data"},
    {"_autograd", "_uneven"},
    {"_kernels"},
    {
        "_kernels.aten",
        "_kernels.cpu",
        "_kernels.operators",
        "_kernels.triton",
        "_collectives",
    },
    {"_kernels._cpu", "_kernels.triton_jit"},
    {"_moments"},
]
LAUNCH_FLOORS = [
    {"train", "semi_supervised", "advprop", "evaluate"},
    {"benchmark.__main__"},
    {"benchmark.figures", "benchmark.options", "benchmark.scaling"},
    {"benchmark.report", "benchmark.layers", "benchmark.model"},
    {"benchmark.timing", "benchmark.shapes"},
    {"benchmark.implementations"},
    {"recipe.semi_supervised_figures", "recipe.advprop_figures"},
    {"recipe.comparison"},
    {"recipe.run"},
    {"recipe.trainer"},
    {"recipe.preparation"},
    {"recipe.report", "recipe.evaluation", "recipe.loading", "recipe.losses", "recipe.start"},
    {"recipe.consistency", "recipe.attack"},
    {"recipe.semi_supervised_options", "recipe.advprop_options"},
    {
        "recipe.checkpoints",
        "recipe.interruption",
        "recipe.models",
        "recipe.optimization",
    },
    {"images.labelled"},
    {"recipe.options", "images.sets"},
    {"images.digits", "images.folders", "images.views", "images.shift"},
    {"images.augment", "recipe.parser"},
    {"recipe.lock", "recipe.failure"},
    {"recipe.errors"},
]
FLOOR = {name: depth for depth, names in enumerate(FLOORS) for name in names}


def name_of(path, root=ROOT):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path, root=ROOT, floor=FLOOR):
    """Names of the package's own modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.relative_to(root).parts[: -node.level]
            module = [*folder, *(node.module or "").split(".")]
            for alias in node.names:
                inside = ".".join(filter(None, [*module, alias.name]))
                outside = ".".join(filter(None, module)) or "__init__"
                yield inside if inside in floor else outside
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if not modules else []
            assert not any(name.startswith(root.name) for name in modules), "import relatively"


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_strictly_downward(path):
    for imported in imports_of(path):
        assert FLOOR[name_of(path)] < FLOOR[imported], f"{name_of(path)} imports {imported}"


LAUNCHED = sorted(path for path in LAUNCH.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: name_of(path, LAUNCH))
def test_imports_of_the_recipes_point_strictly_downward(path):
    floor = {name: depth for depth, names in enumerate(LAUNCH_FLOORS) for name in names}
    for imported in imports_of(path, LAUNCH, floor):
        assert floor[name_of(path, LAUNCH)] < floor[imported], f"{path} imports {imported}"


def test_recipes_see_public_names_alone():
    for path in LAUNCHED:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sync_splitbn"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not any(name.startswith("_") for name in names), f"{path}: {names}"


def test_layer_reaches_the_kernels_through_the_function_alone():
    for name in ("layer", "_state", "assignment", "convert"):
        for imported in imports_of(ROOT / f"{name}.py"):
            assert not imported.startswith("_kernels"), f"{name} imports {imported}"


def test_only_collectives_speaks_to_torch_distributed():
    for path in FILES:
        if name_of(path) == "_collectives":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            source = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            full = [source + name.name for name in names]
            assert not any(name.startswith("torch.distributed") for name in full), path


def test_public_names_are_those_of_the_contract():
    assert sorted(sync_splitbn.__all__) == [
        "SyncSplitBatchNorm",
        "assign_splits",
        "check_replicas",
        "convert_sync_split_batchnorm",
        "data",
        "frozen_stats",
        "revert_sync_split_batchnorm",
        "split_divergence",
        "sync_group",
        "sync_split_batch_norm",
    ]


def test_readme_names_tests_that_exist():
    readme = (ROOT.parent / "README.md").read_text()
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", readme)
    assert len(named) > 20
    for file, test in named:
        (path,) = Path(__file__).parent.rglob(file)
        assert f"def {test}(" in path.read_text(), test
    assert not re.search(r"…::?|…_to|{[A-Z]+}", readme), "names are written out"


def test_every_mutant_has_its_place_in_the_package():
    pytest.importorskip("tomllib")
    mutants = importlib.import_module("mutants")
    for mutant in mutants.read():
        mutant.applied((ROOT.parent / mutant.path).read_text())
