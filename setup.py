"""Build entry point: metadata is in pyproject.toml, the compiled kernels are here.

ESPER_NO_EXT=1 leaves them out; MAX_JOBS limits the compilers that run at once.
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 says so of its own AVX-512 header
KERNELS = [
    "csrc/call.cpp",
    "csrc/cpu/driver.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/avx512.cpp",
    "csrc/cpu/avx2.cpp",
    "csrc/cpu/baseline.cpp",
]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # every torch from 2.10 on
HEADERS = ["driver.h", "kernels.h", "simd.h", "cross_entropy.h", "grad_stats.h"]


def compiled() -> dict[str, Any]:
    """What `setup` needs to build the kernels; prints what was decided and why."""
    if os.environ.get("ESPER_NO_EXT") == "1":
        print("esper-kernels: pure Python, because ESPER_NO_EXT=1")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError:
        sys.exit(
            "esper-kernels: cannot import torch, against which the kernels are compiled; install it and run "
            "pip with --no-build-isolation, or set ESPER_NO_EXT=1 for pure Python"
        )
    import pybind11

    Path("esper_kernels/lib").mkdir(exist_ok=True)  # where an editable build copies the library of ops to
    depends = ["csrc/call.h", "csrc/tensors.h", *(f"csrc/cpu/{name}" for name in HEADERS)]
    ops = CppExtension(
        "esper_kernels.lib.esper_cpu",  # in a folder of its own: it is no Python module
        ["csrc/ops_cpu.cpp", *KERNELS],
        depends=depends,
        extra_compile_args=[*FLAGS, STABLE_ABI],
        extra_link_args=["-s"],
        py_limited_api=True,  # no Python in it: one library for every version
    )
    facts = Extension(
        "esper_kernels._native",
        ["csrc/bindings.cpp"],
        depends=depends,
        include_dirs=[pybind11.get_include(), *include_paths()],  # ATen/dlpack.h
        extra_compile_args=["-std=c++17", *FLAGS],
        extra_link_args=["-s"],
    )
    print(f"esper-kernels: building CPU kernels against torch {torch.__version__}; for pure Python set ESPER_NO_EXT=1")
    return {
        "ext_modules": [ops, facts],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    }


setup(**compiled())
