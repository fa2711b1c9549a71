"""The installed files: the wheel beside torch alone, pure Python, and messages of failed builds.

Long file: all of these tests share the wheel, which takes minutes to make.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler

from benchmarks import cuda_resources
from esper_kernels.native import INSTRUCTION_SETS
from tests.helpers.wheels import BIN, ROOT, output, run, sources

WHEEL = [
    sys.executable,
    "-m",
    "pip",
    "wheel",
    "--no-build-isolation",
    "--no-deps",
    "-w",
    "dist",
    ".",
]

# torch is unpacked, and everything compiled
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# The step in C++ against the definition, from wherever the package was installed to.
SMOKE = """
import torch, esper_kernels, esper_train
from esper_kernels import KernelConfig, Meter, cross_entropy_step, grad_stats

logits, targets = torch.randn(70, 33), torch.randint(33, (70,))
meters, grads, norms = [], [], []
for backend in ("eager", BACKEND):
    config = KernelConfig(backend=backend)
    meters.append(Meter("cpu"))
    grad = cross_entropy_step(logits, targets, meters[-1], label_smoothing=0.1, config=config)
    grads.append(grad)
    norms.append(grad_stats([logits], config=config).total_norm)
torch.testing.assert_close(*grads)
torch.testing.assert_close(*norms)
assert torch.equal(meters[0].counts, meters[1].counts)
print(esper_kernels.__file__)
"""

# A Python without torch loads torch's library, in which there is no Python, then the ops.
OTHER_PYTHON = """
import ctypes, sys
libtorch, library = sys.argv[1:]
ctypes.CDLL(libtorch, mode=ctypes.RTLD_GLOBAL)
ops = ctypes.CDLL(library)
ops.esper_has_instruction_set.restype = ctypes.c_bool
names = ("auto", "avx512bf16", "avx512", "avx2", "baseline")
print(*(n for i, n in enumerate(names) if i and ops.esper_has_instruction_set(ctypes.c_int64(i))))
"""

# What the library of CUDA ops thinks of this machine, and whether its ops are registered.
CUDA = """
import ctypes, torch, esper_kernels
from esper_kernels.native import _CUDA_LIBRARY
torch.ops.load_library(str(_CUDA_LIBRARY))
reason = ctypes.create_string_buffer(300)
ctypes.CDLL(str(_CUDA_LIBRARY)).esper_cuda_refusal(reason, ctypes.c_int64(300))
print(reason.value.decode())
ops = ("cross_entropy", "cross_entropy_backward", "grad_stats")
print(all(torch._C._dispatch_has_kernel_for_dispatch_key(f"esper::{op}", "CUDA") for op in ops))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel of `make wheel`, with CUDA kernels if there is a toolkit, and the output of the
    command. Beside the wheel is the folder build with its log."""
    for tool in (get_cxx_compiler().split()[0], "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    folder = sources(tmp_path_factory.mktemp("wheel") / "esper")
    # With the environment of this test.
    (folder / ".venv").symlink_to(BIN.parent)
    variables = {"TORCH_CUDA_ARCH_LIST": "9.0+PTX", "PATH": os.environ["PATH"]}
    variables["NVCC_APPEND_FLAGS"] = "-Xptxas=-v"  # for the test of registers
    said = output(["make", "-o", ".venv/.ready", "wheel"], folder, **variables)
    (built,) = (folder / "dist").iterdir()
    return built, said


@pytest.fixture(scope="module")
def wheel(made: tuple[Path, str]) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of an environment with torch and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    output([sys.executable, "-m", "venv", "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    done = run(
        [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "torch"], folder
    )
    if done.returncode != 0:
        pytest.skip(f"the pinned torch cannot be installed here: {done.stderr[-300:]}")
    yield python
    shutil.rmtree(folder)  # close to a gigabyte


def test_wheel_holds_both_packages_and_the_kernels(wheel: Path, unpacked: Path) -> None:
    assert re.fullmatch(r"esper_kernels-0\.1\.0-py3-none-manylinux_2_\d+_[\w.]+\.whl", wheel.name)
    names = sorted(
        str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()
    )
    assert {name.split("/")[0] for name in names} == {
        "esper_kernels",
        "esper_train",
        "esper_kernels-0.1.0.dist-info",
    }
    binaries = [
        name for name in names if not name.endswith((".py", "py.typed")) and "dist-info" not in name
    ]
    libraries = ["esper_cpu.so", "esper_cuda.so"] if shutil.which("nvcc") else ["esper_cpu.so"]
    assert binaries == [f"esper_kernels/lib/{name}" for name in libraries]
    metadata = (unpacked / "esper_kernels-0.1.0.dist-info/METADATA").read_text()
    required = [
        line
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert required == ["Requires-Dist: torch>=2.10"]


def test_making_it_says_what_it_needs(made: tuple[Path, str]) -> None:
    wheel, said = made
    kernels = "CUDA kernels with " if shutil.which("nvcc") else "no CUDA kernels, because: "
    assert re.search(rf"building CPU kernels against torch \S+; {kernels}", said)
    needs = " ".join(said.split())
    assert "libc.so.6 with versions {" in needs
    assert any(
        f'constrains the platform tag to "{tag}"' in needs
        for tag in wheel.stem.split("-")[-1].split(".")
    )


def test_its_cuda_kernels_do_not_spill(wheel: Path) -> None:
    """On the GPU that it was compiled for, by the assembler's report; tests/kernels/test_cuda.py
    compiles for others."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    log = (wheel.parents[1] / "build/wheel.log").read_text(encoding="utf-8")
    rows = cuda_resources.rows_of(log, 90)
    recorded = json.loads((ROOT / "benchmarks/results/cuda-resources.json").read_text())["figures"]
    names = sorted(row["kernel"] for row in recorded if row["sm"] == 90)
    assert sorted(row["kernel"] for row in rows) == names
    for row in rows:
        assert 0 < row["registers"] <= 255, row
        assert row["spilled_bytes"] == 0, row


def test_libraries_need_nothing_of_torch_but_its_stable_interface(unpacked: Path) -> None:
    """They need nothing of Python either: one library serves every torch from 2.10 on, and every
    Python."""
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    for library in (unpacked / "esper_kernels/lib").iterdir():
        undefined = output(["nm", "-DC", "--undefined-only", library], unpacked).splitlines()
        names = [line.split()[-1] for line in undefined]
        torchs = [
            name for name in names if "torch" in name or "c10" in name or name.startswith("at::")
        ]
        assert "torch_call_dispatcher" in torchs
        assert [name for name in torchs if not name.startswith(("aoti_torch_", "torch_"))] == []
        assert [name for name in names if name.startswith(("Py", "_Py", "cuda", "cu"))] == []


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14", "3.14t"])
def test_wheel_serves_other_pythons(version: str, wheel: Path, tmp_path: Path) -> None:
    """The wheel is installed by their own pip, and tried as far as is possible where they have no
    torch."""
    python = find_python(version)
    target = tmp_path / "target"
    output(
        [python, "-m", "pip", "install", "--no-index", "--no-deps", "--target", target, wheel],
        tmp_path,
    )
    package = target / "esper_kernels"
    libtorch = Path(torch.__file__).with_name("lib") / "libtorch.so"
    command = [python, "-c", OTHER_PYTHON, libtorch, package / "lib/esper_cpu.so"]
    assert output(command, tmp_path).split() == list(INSTRUCTION_SETS)


def find_python(version: str) -> str:
    """An interpreter of this version, or the test is skipped."""
    found = shutil.which(f"python{version}")
    if (
        found is not None
        and run([found, "-m", "pip", "--version"], ROOT).returncode != 0
        and shutil.which("pyenv")
    ):
        # a launcher without a version behind it: it has them under names of their own
        versions = run(["pyenv", "whence", f"python{version}"], ROOT).stdout.split()
        prefix = run(["pyenv", "prefix", *versions[-1:]], ROOT).stdout.strip()
        found = f"{prefix}/bin/python{version}" if versions else None
    if found is None or run([found, "-m", "pip", "--version"], ROOT).returncode != 0:
        pytest.skip(f"no python{version} with pip here")
    return found


@pytest.mark.skipif(
    torch.version.cuda is not None,
    reason="here `make` builds it, and the other kernel tests run it",
)
def test_cuda_library_loads_without_a_gpu(unpacked: Path, tmp_path: Path) -> None:
    if not (unpacked / "esper_kernels/lib/esper_cuda.so").exists():
        pytest.skip("no nvcc here")
    if find_library("cuda") is not None or shutil.which("gcc") is None:
        pytest.skip("an NVIDIA driver or no gcc here")
    # A torch without CUDA lacks one function that the library needs.
    stub = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / "stub.so")]
    subprocess.run(command, input=stub, text=True, check=True)
    said = output(
        [sys.executable, "-c", CUDA],
        tmp_path,
        LD_PRELOAD=f"{tmp_path}/stub.so",
        PYTHONPATH=str(unpacked),
    )
    assert said.splitlines() == ["there is no NVIDIA driver", "True"]


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
    """This holds even if it is made in a tree where the kernels lie compiled."""
    folder = sources(tmp_path / "esper", built=True)
    output(WHEEL, folder, ESPER_NO_EXT="1")
    (wheel,) = (folder / "dist").iterdir()
    assert wheel.name == "esper_kernels-0.1.0-py3-none-any.whl"
    target = tmp_path / "target"
    output(
        [
            clean_python,
            "-m",
            "pip",
            "install",
            "--no-index",
            "--no-deps",
            "--target",
            target,
            wheel,
        ],
        tmp_path,
    )
    facts = output(
        [clean_python, "-m", "esper_kernels.info"], tmp_path, PYTHONPATH=str(target)
    ).splitlines()
    row = next(line for line in facts if line.split()[:2] == ["cross_entropy", "cpu"])
    assert row.split()[2] == "eager"
    assert "cpp: the CPU kernels are not built (pure Python install)" in row
    where = output(
        [clean_python, "-c", SMOKE.replace("BACKEND", "'auto'")], tmp_path, PYTHONPATH=str(target)
    )
    assert Path(where.strip()).is_relative_to(target)


WITHOUT_TORCH = (
    "esper-kernels: cannot import torch, against which the kernels are compiled; install it and "
    "run pip with --no-build-isolation, or set ESPER_NO_EXT=1 for pure Python"
)


def test_build_without_torch_says_what_to_do(tmp_path: Path) -> None:
    blocked = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build']; "
    done = run(
        [sys.executable, "-c", blocked + "runpy.run_path('setup.py', run_name='__main__')"],
        sources(tmp_path / "esper"),
    )
    assert done.returncode == 1
    assert done.stderr.strip() == WITHOUT_TORCH


def test_isolated_build_says_what_to_do(tmp_path: Path) -> None:
    """The environment that pip makes for a build has no torch, and must not fetch gigabytes of
    it."""
    command = [word for word in WHEEL if word != "--no-build-isolation"]
    done = run(command, sources(tmp_path / "esper"), PIP_CONSTRAINT=str(ROOT / "constraints.txt"))
    assert done.returncode != 0
    if "installing build dependencies did not" in (done.stdout + done.stderr).lower():
        pytest.skip("pip cannot fetch the build's requirements here")
    assert WITHOUT_TORCH in done.stdout + done.stderr


def test_build_without_a_compiler_says_what_to_do(tmp_path: Path) -> None:
    done = run(
        [sys.executable, "setup.py", "build"],
        sources(tmp_path / "esper"),
        CXX="/nonexistent/c++ -m64",
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "esper-kernels: there is no C++ compiler '/nonexistent/c++ -m64'; install one (g++), name "
        "it in CXX, or set ESPER_NO_EXT=1 for pure Python"
    )


# setup.py as it is, but for the compilers: the names of what it would build
LISTED = """
import runpy, sys
from torch.utils.cpp_extension import BuildExtension
BuildExtension.build_extensions = lambda self: print(*(each.name for each in self.extensions))
BuildExtension.copy_extensions_to_source = lambda self: None
sys.argv = ["setup.py", "build_ext", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize("options", [[], ["--inplace"]], ids=["build", "inplace"])
def test_only_builds_in_place_have_the_module_of_the_tests(
    options: list[str], tmp_path: Path
) -> None:
    printed = output(
        [sys.executable, "-c", LISTED, *options],
        sources(tmp_path / "esper"),
        ESPER_TESTING="1",
        NO_CUDA="1",
    )
    built = next(line for line in printed.splitlines() if line.startswith("esper_kernels.lib"))
    assert built.split() == ["esper_kernels.lib.esper_cpu", *(["tests.helpers.cpp"] * len(options))]
