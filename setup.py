"""Build entry point: metadata is in pyproject.toml, the compiled kernels are here.

ESPER_NO_EXT=1 leaves them out; MAX_JOBS limits the compilers that run at once. CUDA kernels are
built where torch is built with CUDA and a toolkit is found (CUDA_HOME, or nvcc on the path), for
TORCH_CUDA_ARCH_LIST; no GPU is needed. FORCE_CUDA=1 builds them or fails, against any torch;
NO_CUDA=1 leaves them out. ESPER_ARCH=aarch64 compiles the CPU kernels for aarch64 on another
machine, against torch's wheel for aarch64, which pip downloads. ESPER_TESTING=1 adds the module of
csrc/testing.cpp to an editable install and to `build_ext --inplace`, beside the tests that use it.

Long functions: `compiled` is the list of extensions with their sources and flags.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# GCC 12 says so of its own AVX-512 header
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
KERNELS = [
    "csrc/call.cpp",
    "csrc/cpu/driver.cpp",
    "csrc/cpu/measures.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/avx512bf16.cpp",
    "csrc/cpu/avx512.cpp",
    "csrc/cpu/avx2.cpp",
    "csrc/cpu/baseline.cpp",
]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # every torch from 2.10 on
HEADERS = [
    "driver.h",
    "kernels.h",
    "measures.h",
    "simd.inc",
    "elements.inc",
    "cross_entropy.inc",
    "tiles.inc",
    "class_sums.inc",
    "token_logprobs.inc",
    "grad_stats.inc",
    "vector_functions.inc",
]
# those that nvcc knows; newer GPUs compile from the last
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
CUDA_KERNELS = [
    f"csrc/cuda/{name}.cu" for name in ("cross_entropy", "token_logprobs", "grad_stats")
]
CUDA_LIBRARIES = ["-ltorch", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
CUDA_DEPENDS = [
    "csrc/call.h",
    "csrc/ops.h",
    "csrc/tensors.h",
    *(
        f"csrc/cuda/{name}.h"
        for name in (
            "driver",
            "cross_entropy_elements",
            "cross_entropy_few",
            "cross_entropy_measures",
            "cross_entropy_rows",
            "rows",
            "simt",
            "words",
        )
    ),
]


def find_cuda(torch_cuda: str | None) -> tuple[Path | None, str]:
    """The folder of the toolkit to build with, or None; and why."""
    forced = os.environ.get("FORCE_CUDA") == "1"
    if os.environ.get("NO_CUDA") == "1":
        return None, "NO_CUDA=1"
    if not forced and torch_cuda is None:
        return None, "this torch is built without CUDA (FORCE_CUDA=1 builds them all the same)"
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin") or shutil.which(
        "nvcc"
    )
    if nvcc is not None:
        # It may be a script or a link that stands elsewhere; what it would do says where it is at
        # home.
        plan = subprocess.run(
            [nvcc, "--dryrun", "-c", "nothing.cu"], capture_output=True, text=True
        ).stderr
        home = re.search(r"^#\$ TOP=(\S+)", plan, re.MULTILINE)
        if home is not None:
            return Path(
                home[1]
            ).resolve(), "FORCE_CUDA=1" if forced else f"torch is built with CUDA {torch_cuda}"
    if forced:
        sys.exit(
            "esper-kernels: FORCE_CUDA=1, but there is no nvcc; set CUDA_HOME to a CUDA toolkit"
        )
    return None, "there is no nvcc (set CUDA_HOME to a CUDA toolkit)"


def gencode(cuda: Path) -> list[str]:
    """Options of nvcc for TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX", also with ;), or for what we
    choose."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not names:
        known = subprocess.check_output([cuda / "bin/nvcc", "--list-gpu-arch"], text=True).split()
        names = [name for name in CUDA_ARCHITECTURES if f"compute_{name.replace('.', '')}" in known]
        names[-1] += "+PTX"
    options = []
    for name in names:
        if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", name):
            sys.exit(
                "esper-kernels: TORCH_CUDA_ARCH_LIST holds numbers such as 9.0 or 9.0+PTX, got "
                f"{name!r}"
            )
        number = name.removesuffix("+PTX").replace(".", "")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def compile_cuda(cuda: Path, folder: Path) -> list[str]:
    """Objects of the CUDA kernels; torch's own build step would ask for a torch built with CUDA."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in CUDA_KERNELS:
        made = folder / f"{Path(source).stem}.o"
        told = folder / f"{Path(source).stem}.options"
        newest = max(Path(path).stat().st_mtime for path in (source, *CUDA_DEPENDS))
        command = [
            str(cuda / "bin/nvcc"),
            "-c",
            "-std=c++17",
            "-O3",
            "-Icsrc",
            *gencode(cuda),
            source,
        ]
        command.append("-Xcompiler=-fPIC,-fvisibility=hidden")
        # the toolkit and the architectures
        same = told.exists() and told.read_text() == " ".join(command)
        if not same or not made.exists() or made.stat().st_mtime < newest:
            print(" ".join(command))
            told.unlink(missing_ok=True)
            threads = f"--threads={os.environ.get('MAX_JOBS', '0')}"
            subprocess.run([*command, threads, "-o", str(made)], check=True)
            told.write_text(" ".join(command))
        objects.append(str(made))
    return objects


class AnyPython(bdist_wheel):
    """A wheel for every Python of this platform: its libraries are torch ops, without any Python in
    them."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


CROSS_COMPILER = "aarch64-linux-gnu-g++"
CROSS_TORCH = Path("build/torch-aarch64")


def torch_for_aarch64(version: str) -> Path:
    """The folder of this release of torch for aarch64, which pip downloads if it is not there."""
    folder = CROSS_TORCH / version
    if folder.exists():
        return folder / "torch"
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 17)]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += [*platforms, "--dest", str(part), f"torch=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"esper-kernels: pip finds no torch {version} for aarch64, against which the kernels "
            f"are compiled: {done.stderr.strip()[-500:]}"
        )
    (wheel,) = part.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        wanted = re.compile(r"torch/include/.*|torch/lib/lib(c10|torch|torch_cpu)\.so")
        archive.extractall(part, filter(wanted.fullmatch, archive.namelist()))
    wheel.unlink()
    part.rename(folder)
    return folder / "torch"


def cross_compiled(version: str) -> dict[str, Any]:
    """The arguments with which `setup` builds the CPU kernels for aarch64. The options of this
    machine's Python and its compiler are not used."""
    compiler = shutil.which(CROSS_COMPILER)
    if compiler is None:
        sys.exit(
            f"esper-kernels: ESPER_ARCH=aarch64, but there is no {CROSS_COMPILER}; install it (on "
            "Debian: apt-get install g++-aarch64-linux-gnu)"
        )
    if os.environ.get("FORCE_CUDA") == "1":
        sys.exit(
            "esper-kernels: FORCE_CUDA=1, but CUDA kernels are not cross-compiled; build the wheel "
            "on an aarch64 machine, or without FORCE_CUDA"
        )
    torch = torch_for_aarch64(version)

    class CrossBuild(build_ext):
        def get_ext_filename(self, fullname: str) -> str:
            return f"{fullname.replace('.', '/')}.so"

        def build_extension(self, extension: Extension) -> None:
            to = Path(self.get_ext_fullpath(extension.name))
            to.parent.mkdir(parents=True, exist_ok=True)
            command = [compiler, "-shared", "-fPIC", "-std=c++20", *FLAGS, STABLE_ABI, "-s"]
            command += [f"-I{torch}/include", *extension.sources, "-o", str(to)]
            # What torch exports of the C++ library is taken from there, with its version, which
            # auditwheel reads. All that is taken from torch has to be in it.
            command += ["-lstdc++", f"-L{torch}/lib", "-lc10", "-ltorch", "-ltorch_cpu"]
            command += ["-Wl,--no-undefined"]
            print(" ".join(command))
            subprocess.run(command, check=True)

    class CrossWheel(AnyPython):
        def get_tag(self) -> tuple[str, str, str]:
            return *super().get_tag()[:2], "linux_aarch64"

    print(
        f"esper-kernels: building CPU kernels for aarch64 against torch {version}; no CUDA "
        "kernels, because: they are not cross-compiled"
    )
    ops = Extension("esper_kernels.lib.esper_cpu", ["csrc/ops_cpu.cpp", *KERNELS])
    commands = {"build_ext": CrossBuild, "bdist_wheel": CrossWheel}
    return {"ext_modules": [ops], "cmdclass": commands}


def compiled() -> dict[str, Any]:
    """The arguments with which `setup` builds the kernels; prints what was decided and why."""
    if os.environ.get("ESPER_NO_EXT") == "1":
        print("esper-kernels: pure Python, because ESPER_NO_EXT=1")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ImportError:
        sys.exit(
            "esper-kernels: cannot import torch, against which the kernels are compiled; install "
            "it and run pip with --no-build-isolation, or set ESPER_NO_EXT=1 for pure Python"
        )
    architecture = os.environ.get("ESPER_ARCH") or platform.machine()
    if architecture != platform.machine():
        if architecture != "aarch64":
            sys.exit(
                "esper-kernels: ESPER_ARCH is aarch64 or this machine's architecture, "
                f"{platform.machine()}; got {architecture!r}"
            )
        return cross_compiled(torch.__version__.partition("+")[0])
    if shutil.which(get_cxx_compiler().split()[0]) is None:
        sys.exit(
            f"esper-kernels: there is no C++ compiler {get_cxx_compiler()!r}; install one (g++), "
            "name it in CXX, or set ESPER_NO_EXT=1 for pure Python"
        )
    # where an editable build copies the library of ops to
    Path("esper_kernels/lib").mkdir(exist_ok=True)
    depends = [f"csrc/{name}" for name in ("call.h", "ops.h", "tensors.h")]
    depends += [f"csrc/cpu/{name}" for name in HEADERS]
    ops = CppExtension(
        "esper_kernels.lib.esper_cpu",  # in a folder of its own: it is no Python module
        ["csrc/ops_cpu.cpp", *KERNELS],
        depends=depends,
        extra_compile_args=[*FLAGS, STABLE_ABI],
        extra_link_args=["-s"],
        py_limited_api=True,  # do not link torch's Python library
    )
    extensions = [ops]
    testing = Extension("tests.helpers.cpp", ["csrc/testing.cpp", *KERNELS], depends=depends)
    if os.environ.get("ESPER_TESTING") == "1":
        import pybind11

        testing.include_dirs = [pybind11.get_include()]
        testing.extra_compile_args = ["-std=c++17", *FLAGS, "-DESPER_TESTING"]
        extensions.append(testing)
    cuda, why = find_cuda(torch.version.cuda)
    if cuda is not None:
        gpu_ops = CppExtension(
            "esper_kernels.lib.esper_cuda",
            ["csrc/ops_cuda.cpp", "csrc/call.cpp", "csrc/cuda/driver.cpp"],
            depends=CUDA_DEPENDS,
            include_dirs=[str(Path("csrc").absolute()), str(cuda / "include")],
            extra_compile_args=[*FLAGS, STABLE_ABI, "-DUSE_CUDA"],
            # The CUDA runtime is inside: torch's may be of another version. libtorch brings
            # libtorch_cuda.
            extra_link_args=[
                "-s",
                "-Wl,--exclude-libs,ALL,--no-as-needed",
                f"-L{cuda}/lib64",
                *CUDA_LIBRARIES,
            ],
            py_limited_api=True,
        )
        extensions.append(gpu_ops)

    class Build(BuildExtension):  # type: ignore[misc]
        def run(self) -> None:  # `inplace` is off while `build_extensions` runs
            if not (self.editable_mode or self.inplace):  # a wheel takes nothing for tests
                self.extensions = [
                    extension for extension in self.extensions if extension is not testing
                ]
            super().run()

        def build_extensions(self) -> None:
            if cuda is not None:
                gpu_ops.extra_objects = compile_cuda(cuda, Path(self.build_temp) / "cuda")
            super().build_extensions()

    print(
        f"esper-kernels: building CPU kernels against torch {torch.__version__}; "
        f"{f'CUDA kernels with {cuda}' if cuda else 'no CUDA kernels'}, because: {why}; for pure "
        "Python set ESPER_NO_EXT=1"
    )
    return {
        "ext_modules": extensions,
        "cmdclass": {
            "build_ext": Build.with_options(no_python_abi_suffix=True),
            "bdist_wheel": AnyPython,
        },
    }


if __name__ == "__main__":  # `benchmarks.compat` reads the compiler options above
    setup(**compiled())
