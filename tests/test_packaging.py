"""What gets installed: the wheel beside torch alone, pure Python, and the message of a build that cannot work."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_cxx_compiler

ROOT = Path(__file__).parent.parent
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "csrc")
BIN = Path(sys.executable).parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ESPER_NO_EXT")}
ENVIRONMENT |= {"PATH": f"{BIN}:{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
WHEEL = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", "."]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # torch is unpacked, and everything compiled

# The step in C++ against the definition, from wherever the package was installed to.
SMOKE = """
import torch, esper_kernels, esper_train
from esper_kernels import KernelConfig, Meter, cross_entropy_step, grad_stats

logits, targets = torch.randn(70, 33), torch.randint(33, (70,))
meters, grads, norms = [], [], []
for backend in ("eager", BACKEND):
    config = KernelConfig(backend=backend)
    meters.append(Meter("cpu"))
    grads.append(cross_entropy_step(logits, targets, meters[-1], label_smoothing=0.1, config=config))
    norms.append(grad_stats([logits], config=config).total_norm)
torch.testing.assert_close(*grads)
torch.testing.assert_close(*norms)
assert torch.equal(meters[0].counts, meters[1].counts)
print(esper_kernels.__file__)
"""


def run(command: list[object], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(word) for word in command]
    return subprocess.run(arguments, cwd=cwd, env={**ENVIRONMENT, **variables}, capture_output=True, text=True)


def output(command: list[object], cwd: Path, **variables: str) -> str:
    done = run(command, cwd, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def sources(to: Path, built: bool = False) -> Path:
    """A copy of what the distribution is made of, with or without what was compiled in place."""
    to.mkdir()
    for name in FILES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, to / name)
    left_out = ["__pycache__"] if built else ["__pycache__", "*.so"]
    for package in ("esper_kernels", "esper_train"):
        shutil.copytree(ROOT / package, to / package, ignore=shutil.ignore_patterns(*left_out))
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in (get_cxx_compiler().split()[0], "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    folder = sources(tmp_path_factory.mktemp("wheel") / "esper")
    output(["make", "-o", ".venv/.ready", "wheel", f"BIN={BIN}"], folder)  # with the environment of this test
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of an environment with torch and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    output([sys.executable, "-m", "venv", "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    done = run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "torch"], folder)
    if done.returncode != 0:
        pytest.skip(f"the pinned torch cannot be installed here: {done.stderr[-300:]}")
    yield python
    shutil.rmtree(folder)  # close to a gigabyte


def test_wheel_holds_both_packages_and_the_kernels(wheel: Path) -> None:
    tag = f"cp3{sys.version_info.minor}"
    assert wheel.name.startswith(f"esper_kernels-0.1.0-{tag}-{tag}-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read("esper_kernels-0.1.0.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {
        "esper_kernels",
        "esper_train",
        "esper_kernels-0.1.0.dist-info",
    }
    binaries = [name for name in names if not name.endswith((".py", "py.typed")) and "dist-info" not in name]
    assert binaries == ["esper_kernels/_native.so", "esper_kernels/lib/esper_cpu.so"]
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.10"]


def test_ops_need_nothing_of_torch_but_its_stable_interface(wheel: Path, tmp_path: Path) -> None:
    """And nothing of Python: one library for every torch from 2.10 on, and every Python."""
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("esper_kernels/lib/esper_cpu.so", tmp_path)
    names = [line.split()[-1] for line in output(["nm", "-DC", "--undefined-only", library], tmp_path).splitlines()]
    torchs = [name for name in names if "torch" in name or "c10" in name or name.startswith("at::")]
    assert "torch_call_dispatcher" in torchs
    assert [name for name in torchs if not name.startswith(("aoti_torch_", "torch_"))] == []
    assert [name for name in names if name.startswith(("Py", "_Py"))] == []


def test_wheel_works_beside_torch_alone_and_changes_nothing_else(
    wheel: Path, clean_python: Path, tmp_path: Path
) -> None:
    def installed() -> dict[str, str]:
        listed = json.loads(output([clean_python, "-m", "pip", "list", "--format=json"], tmp_path))
        return {package["name"]: package["version"] for package in listed}

    before = installed()
    output([clean_python, "-m", "pip", "install", "--no-index", wheel], tmp_path)
    assert installed() == before | {"esper-kernels": "0.1.0"}
    facts = output([clean_python, "-m", "esper_kernels.info"], tmp_path).splitlines()
    assert any(line.split()[:3] == ["cross_entropy", "cpu", "cpp"] for line in facts)
    assert any(line.startswith("CPU kernels: ") and line.endswith("baseline") for line in facts)
    where = output([clean_python, "-c", SMOKE.replace("BACKEND", "'cpp'")], tmp_path)
    assert Path(where.strip()).is_relative_to(clean_python.parents[1])


def test_pure_python_serves_with_eager_and_says_why(clean_python: Path, tmp_path: Path) -> None:
    """Even made in a tree where the kernels lie compiled."""
    folder = sources(tmp_path / "esper", built=True)
    output(WHEEL, folder, ESPER_NO_EXT="1")
    (wheel,) = (folder / "dist").iterdir()
    assert wheel.name == "esper_kernels-0.1.0-py3-none-any.whl"
    target = tmp_path / "target"
    output([clean_python, "-m", "pip", "install", "--no-index", "--no-deps", "--target", target, wheel], tmp_path)
    facts = output([clean_python, "-m", "esper_kernels.info"], tmp_path, PYTHONPATH=str(target)).splitlines()
    row = next(line for line in facts if line.split()[:2] == ["cross_entropy", "cpu"])
    assert row.split()[2] == "eager"
    assert "cpp: the CPU kernels are not built (pure Python install)" in row
    where = output([clean_python, "-c", SMOKE.replace("BACKEND", "'auto'")], tmp_path, PYTHONPATH=str(target))
    assert Path(where.strip()).is_relative_to(target)


WITHOUT_TORCH = (
    "esper-kernels: cannot import torch, against which the kernels are compiled; install it and run pip with "
    "--no-build-isolation, or set ESPER_NO_EXT=1 for pure Python"
)


def test_build_without_torch_says_what_to_do(tmp_path: Path) -> None:
    blocked = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build']; "
    done = run([sys.executable, "-c", blocked + "runpy.run_path('setup.py')"], sources(tmp_path / "esper"))
    assert done.returncode == 1
    assert done.stderr.strip() == WITHOUT_TORCH


def test_isolated_build_says_what_to_do(tmp_path: Path) -> None:
    """pip's own environment for a build has no torch, and must not fetch gigabytes of it."""
    command = [word for word in WHEEL if word != "--no-build-isolation"]
    done = run(command, sources(tmp_path / "esper"), PIP_CONSTRAINT=str(ROOT / "constraints.txt"))
    assert done.returncode != 0
    if "installing build dependencies did not" in (done.stdout + done.stderr).lower():
        pytest.skip("pip cannot fetch the build's requirements here")
    assert WITHOUT_TORCH in done.stdout + done.stderr


def test_build_without_a_compiler_says_what_to_do(tmp_path: Path) -> None:
    done = run([sys.executable, "setup.py", "build"], sources(tmp_path / "esper"), CXX="/nonexistent/c++ -m64")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "esper-kernels: there is no C++ compiler '/nonexistent/c++ -m64'; install one (g++), name it in CXX, or set "
        "ESPER_NO_EXT=1 for pure Python"
    )
