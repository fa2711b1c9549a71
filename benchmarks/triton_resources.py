"""Registers, shared memory and spills of every Triton kernel a launch can select, compiled here without a GPU.

    python -m benchmarks.triton_resources    # writes results/triton-resources.json

An op joins `VARIANTS` with a function that lists what its launches can select. Needs Triton with its interpreter off.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from triton import compile as compile_ahead
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import record
from esper_kernels.grad_stats.triton import NVIDIA_OPTIONS
from esper_kernels.grad_stats.triton_kernels import kernel as grad_stats_kernel

CAPABILITIES = (80, 90, 100)


class Variant(NamedTuple):
    """One specialization of a kernel."""

    name: str
    kernel: Any
    signature: dict[str, str]  # of every argument; "constexpr" for constants
    constants: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages, ...


def grad_stats_variants() -> Iterator[Variant]:
    """The dtypes of `inv_scale`, or none; those of the gradients are all in one kernel."""
    types = {"addresses": "*i64", "layout": "*i64", "partials": "*fp64", "tickets": "*i32", "found_inf": "*fp32"}
    types |= dict.fromkeys(("norms", "max_abs", "total_norm"), "*fp64")
    types |= dict.fromkeys(("zeros", "nans", "infs"), "*i64")
    types |= dict.fromkeys(("num_tensors", "num_pieces", "piece_blocks"), "i32")
    for scale in ("constexpr", "*fp32", "*fp64", "*fp16", "*bf16"):
        signature = {name: scale if name == "inv_scale" else types[name] for name in grad_stats_kernel.arg_names}
        constants = {"inv_scale": None} if scale == "constexpr" else {}
        yield Variant(f"grad_stats inv_scale={scale}", grad_stats_kernel, signature, constants, NVIDIA_OPTIONS)


VARIANTS: tuple[Callable[[], Iterator[Variant]], ...] = (grad_stats_variants,)


def resources(variant: Variant, capability: int) -> dict[str, Any]:
    """Compile for one compute capability, with every pointer as aligned as torch makes it."""
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, parameter in enumerate(variant.kernel.params)
        if variant.signature[parameter.name].startswith("*")
        and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    }
    source = ASTSource(variant.kernel, variant.signature, variant.constants, attributes)
    compiled = compile_ahead(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(\w+):(\d+)", usage[usage.index("REG:") :]))
    return {
        "variant": variant.name,
        "sm": capability,
        "registers": int(found["REG"]),
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        **variant.options,
    }


def measure() -> list[dict[str, Any]]:
    """The resources of every variant of every op on every capability."""
    return [resources(variant, sm) for variants in VARIANTS for variant in variants() for sm in CAPABILITIES]


if __name__ == "__main__":
    rows = measure()
    for row in rows:
        print(row)
    print(record.write("triton-resources", rows))
