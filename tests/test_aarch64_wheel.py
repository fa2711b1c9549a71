"""`make wheel ARCH=aarch64`: what the cross compiler made, and what is refused."""

import platform
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.helpers.wheels import BIN, ROOT, output, run, sources

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(platform.machine() == "aarch64", reason="here it is built as any wheel"),
]

TORCH = "build/torch-aarch64"
ARCHITECTURE = 0xB7  # the number of aarch64 in the header of a library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources beside the wheel that `make` made of them."""
    for tool in ("make", "readelf", "nm", "aarch64-linux-gnu-g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here")
    made = sources(tmp_path_factory.mktemp("aarch64") / "esper")
    (made / ".venv").symlink_to(BIN.parent)
    if (ROOT / TORCH).exists():
        shutil.copytree(ROOT / TORCH, made / TORCH)
    done = run(["make", "-o", ".venv/.ready", "wheel", "ARCH=aarch64"], made)
    if "pip finds no torch" in done.stdout:
        pytest.skip(f"pip cannot download torch for aarch64 here: {done.stdout[-300:]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "building CPU kernels for aarch64 against torch" in done.stdout
    return made


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    """The library of ops in that wheel, which holds no other."""
    (wheel,) = (folder / "dist").iterdir()
    assert re.fullmatch(r"esper_kernels-\S+-py3-none-manylinux_2_\d+_aarch64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == [
            "esper_kernels/lib/esper_cpu.so"
        ]
        return Path(archive.extract("esper_kernels/lib/esper_cpu.so", folder / "unpacked"))


@pytest.mark.long
def test_library_is_for_aarch64_and_knows_nothing_of_this_machine(library: Path) -> None:
    data = library.read_bytes()
    assert int.from_bytes(data[18:20], "little") == ARCHITECTURE
    dynamic = output(["readelf", "-d", library], library.parent)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    assert needed == {"libtorch_cpu.so", *system}
    assert "PATH" not in dynamic
    for place in (ROOT, BIN.parent, Path(torch.__file__).parent, library.parents[3], Path.home()):
        assert str(place).encode() not in data


@pytest.mark.long
def test_tag_names_the_newest_c_library_that_a_symbol_needs(folder: Path, library: Path) -> None:
    """Symbols of the C++ library have their versions too, although torch exports some of them."""
    (wheel,) = (folder / "dist").iterdir()
    versions = output(["readelf", "--version-info", library], library.parent)
    needed = max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", versions))
    tagged = re.search(r"manylinux_2_(\d+)_aarch64", wheel.name)
    assert tagged is not None
    assert needed <= int(tagged[1])
    symbols = output(["nm", "-D", "--undefined-only", library], library.parent).split()
    assert [name for name in symbols if re.match(r"_Z[A-Z]*St[^@]*$", name)] == []


@pytest.mark.long
def test_torch_for_aarch64_exports_whatever_the_library_takes_from_it(
    folder: Path, library: Path
) -> None:
    (libraries,) = (folder / TORCH).glob("*/torch/lib")
    exported: set[str] = set()
    for name in ("libc10.so", "libtorch_cpu.so"):
        listed = output(["nm", "-D", "--defined-only", libraries / name], folder).split()
        exported |= {symbol.partition("@")[0] for symbol in listed}
    undefined = output(["nm", "-D", "--undefined-only", library], folder).splitlines()
    taken = {line.split()[1] for line in undefined if line.split()[0] == "U" and "@" not in line}
    assert "torch_call_dispatcher" in taken
    assert taken - exported == set()


@pytest.mark.slow
def test_refuses_what_it_cannot_build(tmp_path: Path) -> None:
    tree = sources(tmp_path / "esper")

    def refusal(**variables: str) -> str:
        done = run([sys.executable, "setup.py", "build"], tree, **variables)
        assert done.returncode == 1
        return done.stderr.strip()

    assert refusal(ESPER_ARCH="aarch64", PATH="/nonexistent") == (
        "esper-kernels: ESPER_ARCH=aarch64, but there is no aarch64-linux-gnu-g++; install it (on "
        "Debian: apt-get install g++-aarch64-linux-gnu)"
    )
    assert re.fullmatch(
        r"esper-kernels: ESPER_ARCH is aarch64 or this machine's architecture, \w+; got 'riscv64'",
        refusal(ESPER_ARCH="riscv64"),
    )
    if shutil.which("aarch64-linux-gnu-g++"):
        assert refusal(ESPER_ARCH="aarch64", FORCE_CUDA="1") == (
            "esper-kernels: FORCE_CUDA=1, but CUDA kernels are not cross-compiled; build the wheel "
            "on an aarch64 machine, or without FORCE_CUDA"
        )
        without_index = refusal(ESPER_ARCH="aarch64", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
        assert "esper-kernels: pip finds no torch" in without_index
