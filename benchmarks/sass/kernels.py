"""Every GPU kernel as its launches use it, compiled and disassembled without a GPU.

Needs `nvcc` for CUDA, and Triton, whose wheel has the disassembler, for both.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from benchmarks import cuda_resources, triton_resources
from benchmarks.sass.model import CHIPS
from benchmarks.sass.parse import Block, blocks, functions
from esper_kernels.ops.grad_stats import triton as grad_stats_triton

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CUDA_TYPES = {"float32": "float", "bfloat16": "__nv_bfloat16", "float16": "__half"}
_TRITON_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CSRC = cuda_resources.ROOT / "csrc"
_LINKED = ("call.cpp", "cuda/driver.cpp")  # what cross_entropy.cu calls
_PIECE = 32768  # elements: kPieceElements of grad_stats.cu


@dataclass(frozen=True, kw_only=True)
class Code:
    """One kernel's machine code, and what it needs of a multiprocessor."""

    graph: list[Block] = field(repr=False)
    registers: int
    spilled_bytes: int


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A kernel as a launch uses it."""

    name: str
    backend: str
    sm: int
    code: Code
    dtype: str
    row: int  # elements
    writes: bool
    threads: int
    shared_bytes: int
    cluster: int = 1
    teams: int = 1  # of threads, which each stream through a row of their own
    # of a trip around the loop that takes whole rows, or of a program without one; 0 where loops
    # stream through a row
    rows: int = 0
    # of a thread and trip; None to read them off the accesses
    elements: float | None = None
    filled: float = 1.0  # the share of a trip's elements that lie within the row

    @property
    def every_dtype(self) -> bool:
        """Whether the kernel has a loop for each dtype."""
        return self.name.startswith("grad_stats")


def subjects(sm: int, backend: str, only: str = "") -> Iterator[Subject]:
    """The kernels and variants of a backend ("cuda" or "triton") for one architecture whose names
    contain `only`."""
    found = _triton(sm, only) if backend == "triton" else _cuda(sm, only)
    return (subject for subject in found if only in subject.name)


def compilers() -> str:
    """The names and versions of those that make the machine code."""
    release = re.search(r"release ([\d.]+)", _output("nvcc", "--version"))
    return f"nvcc {release[1] if release else 'of unknown version'} and Triton {triton.__version__}"


def disassembled(cubin: Path) -> dict[str, Code]:
    """The kernels of a binary, by their names in the source with template arguments."""
    text = _output(knobs.nvidia.nvdisasm.path, "-c", cubin)
    usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    found = {}
    for name, lines in functions(text).items():
        part = usage[usage.index(f"Function {name}:") :].splitlines()[1]
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", part)}
        found[cuda_resources.readable(name)] = Code(
            graph=blocks(lines),
            registers=used["REG"],
            spilled_bytes=used["STACK"] + used["LOCAL"],
        )
    return found


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compiled(source: str, sm: int) -> dict[str, Code]:
    with tempfile.TemporaryDirectory() as folder:
        cubin, _ = cuda_resources.compile_for(source, sm, Path(folder))
        return disassembled(cubin)


def _cuda(sm: int, only: str) -> Iterator[Subject]:
    kernels = {
        "cross_entropy": _cuda_cross_entropy,
        "token_logprobs": _cuda_token_logprobs,
        "grad_stats": _cuda_grad_stats,
    }
    named = only.partition(",")[0]
    for name, found in kernels.items():
        if named not in kernels or name == named:  # compiling takes long
            yield from found(sm)


def _cuda_cross_entropy(sm: int) -> Iterator[Subject]:
    codes = _compiled("cross_entropy", sm)
    for plan in _plans()[sm]:
        for capped in (False, True):
            yield _cuda_subject(plan, capped, codes, sm)


@dataclass(frozen=True)
class _Plan:
    """A line of plans.cu."""

    dtype: str
    classes: int
    per_lane: int  # classes, where a lane has some of a whole row; else 0
    kept: int
    team: int
    threads: int
    shared_bytes: int
    cluster: int


@cache  # compiling takes half a minute
def _plans() -> dict[int, list[_Plan]]:
    """The launch plan on each chip for each number of classes in each dtype."""
    sources = [Path(__file__).with_name("plans.cu"), *map(_CSRC.joinpath, _LINKED)]
    target = ["-gencode", "arch=compute_90,code=compute_90"]  # none is run
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "plans")
        _output("nvcc", "-std=c++17", f"-I{_CSRC}", *target, *sources, "-o", program)
        for sm, chip in CHIPS.items():
            facts = chip.multiprocessors, chip.shared_of_block, chip.shared, int(chip.clusters)
            lines = _output(program, *map(str, (*facts, *triton_resources.CLASSES))).splitlines()
            words = (line.split() for line in lines)
            found[sm] = [_Plan(dtype, *map(int, numbers)) for dtype, *numbers in words]
    return found


def _cuda_subject(plan: _Plan, capped: bool, codes: dict[str, Code], sm: int) -> Subject:
    """The kernel is chosen as `kernel_of` does it in cross_entropy.cu."""
    start = f"State, {_CUDA_TYPES[plan.dtype]}, {str(capped).lower()}"  # without measures
    whole: dict[str, Any] = {}
    if plan.per_lane:
        alone = str(plan.per_lane == 12).lower()  # kAlonePerLane
        kernel = f"cross_entropy_few_classes<{start}, {plan.per_lane}, {alone}>"
        whole = {"rows": plan.threads // plan.team, "elements": plan.per_lane}
        whole["filled"] = plan.classes / (plan.team * plan.per_lane)
    else:
        kernel = f"cross_entropy_many_classes<{start}, {str(bool(plan.kept)).lower()}>"
        whole = {"teams": plan.threads // plan.team}
    options = "softcap" if capped else "plain"
    return Subject(
        name=f"cross_entropy, {plan.classes} classes, {plan.dtype}, {options}, step",
        backend="cuda",
        sm=sm,
        code=codes[kernel],
        dtype=plan.dtype,
        row=plan.classes,
        writes=True,
        threads=plan.threads,
        shared_bytes=plan.shared_bytes,
        cluster=plan.cluster,
        **whole,
    )


def _cuda_grad_stats(sm: int) -> Iterator[Subject]:
    code = _compiled("grad_stats", sm)["grad_stats_pieces"]
    for dtype in SIZES:
        yield Subject(
            name=f"grad_stats, {dtype}",
            backend="cuda",
            sm=sm,
            code=code,
            dtype=dtype,
            row=_PIECE,
            writes=False,
            threads=256,
            shared_bytes=0,
        )


def _cuda_token_logprobs(sm: int) -> Iterator[Subject]:
    """The kernels with entropies, because only a running kernel knows whether they are wanted.
    Class counts that leave most of a warp without a class are omitted."""
    codes = _compiled("token_logprobs", sm)
    passes = {"forward": "token_logprobs_rows", "backward": "token_logprobs_gradients"}
    for classes in triton_resources.LOGPROB_CLASSES[1:]:
        for dtype, kind in _CUDA_TYPES.items():
            for name, kernel in passes.items():
                yield Subject(
                    name=f"token_logprobs, {classes} classes, {dtype}, entropy, {name}",
                    backend="cuda",
                    sm=sm,
                    code=codes[f"{kernel}<{kind}>"],
                    dtype=dtype,
                    row=classes,
                    writes=name == "backward",
                    threads=32 if classes <= 1024 else 256,
                    shared_bytes=32 * 12,  # kMostWarps states of token_logprobs.cu
                )


def _triton(sm: int, only: str) -> Iterator[Subject]:
    for variants in triton_resources.VARIANTS:
        for variant in variants():
            if only not in _name(variant):
                continue  # compiling takes seconds
            compiled = triton_resources.compiled(variant, GPUTarget("cuda", sm, 32))
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder, "kernel.cubin")
                cubin.write_bytes(compiled.asm["cubin"])
                (code,) = disassembled(cubin).values()
            name = variant.kernel.fn.__name__
            if name == "batch":
                yield _triton_cross_entropy(variant, code, compiled.metadata, sm)
            elif name in ("logprobs_of_rows", "gradients_of_rows"):
                yield _triton_token_logprobs(variant, code, compiled.metadata, sm)
            elif name == "kernel":
                yield from _triton_grad_stats(variant, code, compiled.metadata, sm)


def _name(variant: triton_resources.Variant) -> str:
    name = variant.name.replace("torch.", "")
    name = name.replace("step: batch 0", "step").replace(": kernel 0", "")
    name = name.replace(": logprobs_of_rows 0", ", forward")
    return name.replace(": gradients_of_rows 1", ", backward")


def _triton_cross_entropy(
    variant: triton_resources.Variant, code: Code, metadata: Any, sm: int
) -> Subject:
    names = variant.kernel.arg_names
    constants = {names[place[0]]: value for place, value in variant.constants.items()}
    classes, block, rows = constants["V"], constants["BLOCK"], constants["ROWS"]
    threads = 32 * metadata.num_warps
    return Subject(
        name=_name(variant),
        backend="triton",
        sm=sm,
        code=code,
        dtype=_TRITON_TYPES[variant.signature["logits"].lstrip("*")],
        row=classes,
        writes=constants.get("grad", "given") is not None,
        threads=threads,
        shared_bytes=metadata.shared,
        rows=rows if constants["RESIDENT"] else 0,
        elements=rows * block / threads,
        filled=classes / (-(-classes // block) * block),
    )


def _triton_token_logprobs(
    variant: triton_resources.Variant, code: Code, metadata: Any, sm: int
) -> Subject:
    names = variant.kernel.arg_names
    constants = {names[place[0]]: value for place, value in variant.constants.items()}
    classes, block, threads = constants["V"], constants["BLOCK"], 32 * metadata.num_warps
    whole: dict[str, Any] = {"rows": 1, "elements": block / threads} if classes <= block else {}
    return Subject(
        name=_name(variant),
        backend="triton",
        sm=sm,
        code=code,
        dtype=_TRITON_TYPES[variant.signature["logits"].lstrip("*")],
        row=classes,
        writes="grad" in variant.signature,
        threads=threads,
        shared_bytes=metadata.shared,
        filled=classes / (-(-classes // block) * block),
        **whole,
    )


def _triton_grad_stats(
    variant: triton_resources.Variant, code: Code, metadata: Any, sm: int
) -> Iterator[Subject]:
    for dtype, size in SIZES.items():
        yield Subject(
            name=f"{_name(variant)}, {dtype}",
            backend="triton",
            sm=sm,
            code=code,
            dtype=dtype,
            row=grad_stats_triton.BLOCK_BYTES // size,
            writes=False,
            threads=32 * metadata.num_warps,
            shared_bytes=metadata.shared,
        )
