"""The shape of the tree: who may import whom, where loops over batches may stand, what is
public."""

import ast
import importlib
import pkgutil
from functools import cache
from pathlib import Path

import pytest

import esper_kernels
import esper_train

ROOT = Path(__file__).parent.parent

# A room may import from itself and from the rooms named beside it; a name with a dot is one module
# of a room. Data flows one way: cli -> run -> train.loop -> train.step -> op -> backend.
KERNEL_ARROWS = {
    "version": set(),
    "config": {"version"},
    "sums": set(),
    "native": {"config"},
    "backends": {"config", "native"},
    "readback": set(),
    "measures": set(),
    "places": set(),
    "meter": {"backends", "measures", "places", "readback"},
    "values": set(),
    "checks": {"backends", "config", "meter", "values"},
    "ops": {
        "backends",
        "checks",
        "config",
        "measures",
        "meter",
        "places",
        "readback",
        "sums",
        "values",
    },
    "modules": {"checks", "config", "meter", "ops"},
    "integrations": {"config", "measures", "meter", "ops"},
    "info": {"backends", "config", "meter", "native", "ops", "testing", "version"},
    "testing": {"config", "meter", "ops"},
}
TRAIN_ARROWS = {
    "base": set(),
    "train": {"base"},
    "morph": {"base"},
    "telemetry": {"base"},
    "control": {"base", "morph"},
    "tasks": {"base", "morph", "train.data"},
    "config": {
        "base",
        "control.config",
        "morph.config",
        "rl.config",
        "run.config",
        "tasks.config",
        "telemetry.config",
        "train.config",
    },
    "run": {"base", "config", "control", "morph", "tasks", "telemetry", "train"},
    "rl": {
        "base",
        "config",
        "control",
        "morph",
        "run",
        "tasks",
        "train.data",
        "train.errors",
        "train.launched",
    },
    "audited": {"base", "train.loss"},
    "cli": {"base", "config", "control", "rl", "run", "tasks", "telemetry", "train.errors"},
    "__main__": {"cli"},
}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules(package: str) -> list[tuple[str, ast.Module]]:
    """(group, syntax tree) of each module; the group is the first name below the package, "" for
    its __init__."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        found.append(("" if parts == ("__init__",) else parts[0], parsed(path)))
    return found


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(tree: ast.Module, package: str) -> set[str]:
    """The modules of the package that the tree imports, as "room.module" or "room"."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            folder = (ROOT / node.module.replace(".", "/")).is_dir()
            names |= {
                f"{node.module}.{alias.name}" if folder else node.module for alias in node.names
            }
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    parts = [name.split(".") for name in names]
    return {".".join(p[1:3]) for p in parts if p[0] == package and len(p) > 1}


@pytest.mark.parametrize(
    ("package", "arrows"), [("esper_kernels", KERNEL_ARROWS), ("esper_train", TRAIN_ARROWS)]
)
def test_imports_follow_the_arrows(package: str, arrows: dict[str, set[str]]) -> None:
    for group, tree in modules(package):
        if group == "":
            continue  # the package's own __init__ only gathers public names
        assert group in arrows, f"{package}.{group} is new: say in this test what it may import"
        allowed = arrows[group] | {group}
        wrong = {
            name for name in imports_of(tree, package) if not {name, name.split(".")[0]} & allowed
        }
        assert not wrong, f"{package}.{group} must not import {sorted(wrong)}"


def test_kernels_never_import_the_training_package() -> None:
    for group, tree in modules("esper_kernels"):
        assert not [name for name in imported(tree) if name.startswith("esper_train")], group


def test_training_uses_only_public_names_of_the_kernels() -> None:
    public = {f"esper_kernels.{name}" for name in esper_kernels.__all__} | {"esper_kernels"}
    for group, tree in modules("esper_train"):
        used = {name for name in imported(tree) if name.split(".")[0] == "esper_kernels"}
        assert used <= public, f"esper_train.{group} uses {sorted(used - public)}"


def batch_loops(tree: ast.Module) -> list[str]:
    """The iterables of the tree's loops that look like loops over batches."""
    places = [
        node.iter for node in ast.walk(tree) if isinstance(node, (ast.For, ast.comprehension))
    ]
    texts = [ast.unparse(place) for place in places]
    words = ("loader", "batches", "episode.train", "episode.validation", "episode.test")
    return [text for text in texts if any(word in text for word in words)]


def test_loop_holds_the_only_loops_over_batches() -> None:
    for path in sorted((ROOT / "esper_train").rglob("*.py")):
        found = batch_loops(parsed(path))
        if path == ROOT / "esper_train/train/loop.py":
            assert len(found) == 2  # train_one_epoch and evaluate
        else:
            assert found == [], path


def test_one_place_makes_the_epochs_of_a_run() -> None:
    """The command and the environment drive the same `EpisodeRun`."""
    made = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "esper_train").rglob("*.py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Epoch"
    }
    assert made == {"esper_train/run/run.py"}


def test_only_step_calls_the_loss() -> None:
    for group, tree in modules("esper_train"):
        assert not {n for n in imported(tree) if "cross_entropy" in n} or group in (
            "train",
            "audited",
        ), group


@pytest.mark.parametrize("package", [esper_kernels, esper_train])
def test_all_lists_exactly_the_public_names(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert len(set(names)) == len(names)
    submodules = {m.name for m in pkgutil.iter_modules(package.__path__)}  # type: ignore[attr-defined]
    present = {
        name for name in vars(package) if not name.startswith("_") and name not in submodules
    } | {name for name in names if name in submodules or name == "__version__"}
    assert set(names) == present


@pytest.mark.parametrize("name", ["esper_train.audited", "esper_train.control.rewards"])
def test_all_of_a_module_lists_what_it_defines(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    defined = set()
    for node in parsed(Path(module.__file__)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.AnnAssign):
            defined.add(ast.unparse(node.target))
    assert set(module.__all__) == {name for name in defined if not name.startswith("_")}


@pytest.mark.parametrize("package", ["esper_kernels", "esper_train"])
def test_every_module_says_what_it_is_for(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not path.stat().st_size or ast.get_docstring(parsed(path)), path.name


@pytest.mark.parametrize("package", ["esper_kernels", "esper_train"])
def test_no_module_level_mutable_state(package: str) -> None:
    """Module-level names are constants: no list, dict or set that code could change, no
    `global`."""
    for group, tree in modules(package):
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Global)], group
        for node in tree.body:
            value = getattr(node, "value", None)
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or value is None:
                continue
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            if isinstance(value, (ast.List, ast.Set, ast.ListComp, ast.DictComp, ast.Dict)):
                assert target == "__all__" or target.strip("_").isupper(), f"{group}: {target}"


def test_importing_the_training_package_loads_no_extra() -> None:
    """Packages of the extras are loaded by those who use them."""
    import subprocess
    import sys

    code = (
        "import sys, esper_train, esper_train.rl; print([m for m in ('tyro', 'rich', 'matplotlib', "
        "'sklearn', 'gymnasium', 'stable_baselines3', 'sb3_contrib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_kernels_loads_nothing_besides_torch() -> None:
    """No trainer, no Triton and no part of torch that `import torch` leaves out: each may take as
    long as torch itself."""
    import subprocess
    import sys

    code = (
        "import sys, torch; before = set(sys.modules); import esper_kernels; "
        "print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] not in "
        "{'esper_kernels', *sys.stdlib_module_names}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_imports() -> None:
    """The modules of the integrations are imported by their own tests."""
    for package in (esper_kernels, esper_train):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__") and ".integrations." not in module.name:
                importlib.import_module(module.name)
