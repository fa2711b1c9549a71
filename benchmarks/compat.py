"""Find the releases of torch and Triton that the kernels can be built against and loaded with.

    python -m benchmarks compat           # both, about half an hour
    python -m benchmarks compat torch     # one of them

Downloads one release at a time, 0.5 to 1 GB each, into build/compat and deletes it after use. No
GPU is needed, and no release is installed.

torch: `csrc/ops_*.cpp`, the sources that include torch's headers, are compiled and linked against
the CUDA build of the newest patch of every minor release from 2.10 on. Then every symbol that any
of these libraries takes from torch has to be exported by every release, so that a wheel built with
one of them loads in all.
Triton: every variant that a launch can select is compiled ahead of time, for sm_90, with the newest
patch of every minor release from 3.5 on.

pip's configuration files are not read, because they may constrain torch. The variables `PIP_*` are.
Writes results/compat.json; docs/clusters.md has the table.
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "compat"
OLDEST = {"torch": (2, 10), "triton": (3, 5)}
ROOM = 10 << 30  # bytes on disk for one release, packed and unpacked
SYSTEM_LIBRARIES = ("libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6")
_CAPS = ("PIP_CONSTRAINT", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")
_PIP = {name: value for name, value in os.environ.items() if name not in _CAPS} | {
    "PIP_CONFIG_FILE": os.devnull
}
_OK = "ok"

# Runs with another Triton first on the path. Prints its version, the number of variants that
# compiled, and the failures, as JSON.
_COMPILE_ALL = """
import json, sys
import triton
from triton.compiler import ASTSource
from benchmarks.triton_resources import compile_ahead, every_form, grad_stats_variants, TARGETS
target = TARGETS[1]
compiled, failures = set(), []
for variant in (*grad_stats_variants(), *every_form()):
    facts = str((variant.kernel.fn.__name__, *variant[2:]))
    if facts in compiled:
        continue
    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    try:
        compile_ahead(source, target=target, options=variant.options)
        compiled.add(facts)
    except Exception as error:
        said = " ".join(str(error).split())[-300:]
        failures.append(f"{variant.name} for sm_{target.arch}: {type(error).__name__}: {said}")
        print(failures[-1], file=sys.stderr)
print(json.dumps([triton.__version__, len(compiled), failures]))
"""


class TorchRelease(NamedTuple):
    """The result of compiling Esper's libraries against one release of torch: the errors, the
    symbols that the libraries need, and those that torch exports."""

    version: str
    compiled: dict[str, str]  # by source: "ok", or the compiler's first error
    needed: dict[str, list[str]]  # by source: symbols that are in no system library
    exported: frozenset[str]


def releases(package: str) -> list[str]:
    """The newest patch of every minor release that the index has, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    listed = subprocess.run(command, env=_PIP, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", listed)
    if found is None:
        raise RuntimeError(f"pip does not say which versions of {package} there are: {listed!r}")
    return newest_patches(found[1].split(", "), OLDEST[package])


def newest_patches(versions: list[str], oldest: tuple[int, int]) -> list[str]:
    """The newest patch of every minor release from `oldest` on; versions unlike "2.12.1" are
    ignored."""
    newest: dict[tuple[int, int], int] = {}
    for version in versions:
        found = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", version)
        if found is not None:
            major, minor, patch = map(int, found.groups())
            newest[major, minor] = max(patch, newest.get((major, minor), 0))
    return [
        f"{major}.{minor}.{patch}"
        for (major, minor), patch in sorted(newest.items())
        if (major, minor) >= oldest
    ]


@contextmanager
def downloaded(package: str, version: str) -> Iterator[Path]:
    """The wheel of a release, in a folder that is deleted afterwards."""
    folder = FOLDER / f"{package}-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if shutil.disk_usage(folder).free < ROOM:
        raise RuntimeError(
            f"{folder} needs {ROOM >> 30} GiB of disk; {shutil.disk_usage(folder).free >> 30} are "
            "free"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary=:all:",
    ]
    try:
        subprocess.run(
            [*command, "--dest", str(folder), f"{package}==={version}"], env=_PIP, check=True
        )
        (wheel,) = folder.glob("*.whl")
        yield wheel
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def torch_release(version: str, setup: dict[str, Any], cuda: Path) -> TorchRelease:
    """Build the libraries of ops against one release. `setup`: the names of setup.py."""
    with downloaded("torch", version) as wheel:
        with zipfile.ZipFile(wheel) as archive:
            wanted = re.compile(
                r"torch/(include/.*|lib/lib(torch|c10)\w*\.so|utils/cpp_extension\.py|version\.py)"
            )
            archive.extractall(
                wheel.parent, [name for name in archive.namelist() if wanted.fullmatch(name)]
            )
        wheel.unlink()
        folder = wheel.parent / "torch"
        if runpy.run_path(str(folder / "version.py"))["cuda"] is None:
            raise RuntimeError(
                f"the wheel of torch {version} is no CUDA build; on this index it has none"
            )
        options = [
            "-shared",
            "-fPIC",
            cpp_standard(folder),
            *setup["FLAGS"],
            "-O1",
            setup["STABLE_ABI"],
            "-DUSE_CUDA",
        ]
        options += ["-Icsrc", f"-I{cuda}/include", f"-I{folder}/include"]
        options += [f"-I{folder}/include/torch/csrc/api/include"]
        libraries = [f"-L{folder}/lib", "-Wl,--no-as-needed", "-lc10", "-ltorch", "-ltorch_cpu"]
        compiled = {}
        needed = {}
        for source in sorted((ROOT / "csrc").glob("ops_*.cpp")):
            library = wheel.parent / f"{source.stem}.so"
            command = ["g++", *options, str(source), *libraries, "-o", str(library)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            compiled[source.name] = _OK if done.returncode == 0 else first_error(done.stderr)
            needed[source.name] = undefined(library) if done.returncode == 0 else []
        exported = [symbols(library) for library in sorted((folder / "lib").glob("*.so"))]
    return TorchRelease(version, compiled, needed, frozenset().union(*exported))


def cpp_standard(torch_folder: Path) -> str:
    """The option for the C++ standard that this torch gives to extensions."""
    said = re.findall(r"'(-std=c\+\+\d+)'", (torch_folder / "utils/cpp_extension.py").read_text())
    return Counter(said).most_common(1)[0][0]  # its examples may say another


def first_error(output: str) -> str:
    """The first error in a compiler's output, without its location."""
    found = re.search(r"\b(fatal )?error: .*|undefined reference .*", output)
    return found[0] if found else " ".join(output.split())[-300:] or "no output"


def symbols(library: Path) -> set[str]:
    """The names that a shared library exports."""
    command = ["nm", "-D", "--defined-only", "--format=posix", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[0].partition("@")[0] for line in listed.splitlines()}


def undefined(library: Path) -> list[str]:
    """The names that a library of ops takes from torch.

    The library is linked from its `ops_*.cpp` alone: what is Esper's own is in the other sources.
    Names with a version are the system's; some of the C++ library's have none, because torch
    exports them too.
    """
    command = ["nm", "-D", "--undefined-only", "--format=posix", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in listed.splitlines()]
    names = {
        name for name, kind, *_ in lines if kind == "U" and "@" not in name and "5esper" not in name
    }
    return sorted(names - system_symbols())


def system_symbols() -> set[str]:
    """The names that the compiler's C and C++ libraries export."""
    found: set[str] = set()
    for name in SYSTEM_LIBRARIES:
        command = ["g++", f"-print-file-name={name}"]
        found |= symbols(
            Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        )
    return found


def torch_rows() -> list[dict[str, Any]]:
    """A row for every release of torch: how each source compiled, and the symbols that it lacks."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    cuda, why = setup["find_cuda"]("any")
    if cuda is None:
        sys.exit(f"the headers of the CUDA toolkit are needed: {why}")
    found = []
    for version in releases("torch"):
        found.append(torch_release(version, setup, cuda))
        print(
            "torch",
            version,
            found[-1].compiled,
            {k: len(v) for k, v in found[-1].needed.items()},
            flush=True,
        )
    return compared(found)


def compared(found: list[TorchRelease]) -> list[dict[str, Any]]:
    """Rows for `table`: what any library needs against what each release exports."""
    sources = sorted({source for release in found for source in release.compiled})
    needed = {name for release in found for names in release.needed.values() for name in names}
    return [
        {
            "package": "torch",
            "version": release.version,
            **{source: release.compiled[source] for source in sources},
            "symbols": len(needed),
            "lacks": sorted(needed - release.exported),
        }
        for release in found
    ]


def triton_rows() -> list[dict[str, Any]]:
    """A row for every release of Triton: how many variants compiled, and the errors of the
    others."""
    rows = []
    for version in releases("triton"):
        with downloaded("triton", version) as wheel:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(wheel.parent)
            for program in (wheel.parent / "triton/backends/nvidia/bin").iterdir():
                program.chmod(0o755)
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment |= {
                "PYTHONPATH": f"{wheel.parent}:{ROOT}",
                "TRITON_CACHE_DIR": f"{wheel.parent}/cache",
            }
            command = [sys.executable, "-c", _COMPILE_ALL]
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True
            )
        if done.returncode == 0:
            imported, compiled, failures = json.loads(done.stdout.splitlines()[-1])
            if imported != version:
                raise RuntimeError(
                    f"Triton {version} was to be compiled with, but {imported} was imported"
                )
        else:
            compiled = 0
            failures = [done.stderr.strip().splitlines()[-1]]
        rows.append(
            {"package": "triton", "version": version, "compiled": compiled, "failures": failures}
        )
        print("triton", version, compiled, failures[:3], flush=True)
    return rows


def holds(row: dict[str, Any]) -> bool:
    """Whether nothing failed with this release."""
    if row["package"] == "triton":
        return bool(row["compiled"]) and not row["failures"]
    return not row["lacks"] and all(
        said == _OK for name, said in row.items() if name.endswith(".cpp")
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for torch and one for Triton, a line for each release."""
    lines = [
        "| torch | `ops_cpu.cpp` | `ops_cuda.cpp` | symbols that it exports |",
        "|---|---|---|---|",
    ]
    for row in (row for row in rows if row["package"] == "torch"):
        exported = f"{row['symbols'] - len(row['lacks'])} of {row['symbols']}"
        lines.append(
            f"| {row['version']} | {row['ops_cpu.cpp']} | {row['ops_cuda.cpp']} | {exported} |"
        )
    lines += ["", "| Triton | variants that compile |", "|---|---|"]
    for row in (row for row in rows if row["package"] == "triton"):
        lines.append(
            f"| {row['version']} | {row['compiled']} of {row['compiled'] + len(row['failures'])} |"
        )
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Check the named packages, or both. The exit code is 1 if a check fails."""
    checks = {"torch": torch_rows, "triton": triton_rows}
    if not set(names) <= set(checks):
        sys.exit(f"usage: python -m benchmarks compat [{'|'.join(checks)}], got {' '.join(names)}")
    path = record.RESULTS / "compat.json"
    rows = json.loads(path.read_text())["figures"] if path.exists() else []
    for name in names or checks:
        made = checks[name]()
        rows = sorted(
            [row for row in rows if row["package"] != name] + made, key=lambda row: row["package"]
        )
        record.write("compat", rows)
    print(f"\n{table(rows)}\n\n{path}, on {platform.machine()}")
    if not all(map(holds, rows)):
        sys.exit("not every release holds")


if __name__ == "__main__":
    arguments = record.parser("compat", __doc__)
    arguments.add_argument(
        "packages", nargs="*", metavar="torch|triton", help="one of them; both by default"
    )
    main(arguments.parse_args().packages)
