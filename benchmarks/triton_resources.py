"""Registers, shared memory and spilled bytes of every Triton kernel, compiled without a GPU.

    python -m benchmarks triton_resources    # writes results/triton-resources.json

`VARIANTS` has a function for each op that lists every variant that its launches can select;
`recorded` makes that list from calls of the backend's own functions. Needs Triton with its
interpreter off.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton import compile as compile_ahead
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks import record
from esper_kernels import Meter, grad_stats
from esper_kernels.ops.cross_entropy import triton as cross_entropy
from esper_kernels.ops.cross_entropy.reference import Options
from esper_kernels.ops.grad_stats import triton as grad_stats_triton
from esper_kernels.ops.token_logprobs import triton as token_logprobs
from esper_kernels.ops.token_logprobs.reference import Options as LogprobOptions

CLASSES = (10, 1000, 2000, 4000, 8192, 16000, 50257, 262144)  # at least one for every launch choice
MEASURED_CLASSES = (200, 500)  # more, for the launch choices of options with measures
LOGPROB_CLASSES = (10, 1000, 50257)
TARGETS = tuple(GPUTarget("cuda", capability, 32) for capability in (80, 90, 100))


class Variant(NamedTuple):
    """One specialization of a kernel, in the terms of `ASTSource`."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]  # num_warps, num_stages, ...


def recorded(name: str, call: Callable[[], Any]) -> list[Variant]:
    """The kernels that the launches in `call` would compile on an NVIDIA GPU. None is executed, so
    CPU tensors will do."""
    variants = []
    backend = make_backend(TARGETS[0])

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*arguments, **options)
        _, *facts = kernel._pack_args(backend, options, bound, specialization, options)
        variants.append(
            Variant(f"{name}: {kernel.fn.__name__} {len(variants)}", kernel, *facts, options)
        )

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(torch.version, "cuda", "any"),
    ):
        call()
    return variants


def grad_stats_variants() -> Iterator[Variant]:
    """One variant per dtype of `inv_scale`, and one without it. One kernel has all gradient
    dtypes."""
    grads = [torch.ones(3, dtype=dtype) for dtype in grad_stats_triton.DTYPES]
    stats = grad_stats(grads)
    for scale in (None, *(torch.ones((), dtype=dtype) for dtype in grad_stats_triton.DTYPES)):
        name = f"grad_stats, inv_scale {None if scale is None else scale.dtype}"
        yield from recorded(name, lambda scale=scale: grad_stats_triton.fill(grads, scale, stats))


def cross_entropy_variants() -> Iterator[Variant]:
    """Every launch choice on an H200, with no option and with all of them ("heavy"), without and
    with measures; some in autograd form."""
    meter = Meter("cpu", topk=(5,))
    for classes in CLASSES:
        for name, logits, targets, options in _inputs(classes):
            arguments = (logits, targets, options, meter)
            yield from _on_an_h200(f"{name}, step", cross_entropy.step, *arguments, 1.0, None)
            if classes in (1000, 16000, 262144) and logits.dtype == torch.bfloat16:
                yield from _on_an_h200(f"{name}, autograd", _autograd, *arguments)
    # Not by class: no prediction is computed here that could be counted.
    meter = Meter("cpu", topk=(5,), calibration_bins=15, entropy=True)
    for classes in sorted((*CLASSES, *MEASURED_CLASSES)):
        for name, *inputs in _inputs(classes):
            name = f"{name}, measured, step"
            yield from _on_an_h200(name, cross_entropy.step, *inputs, meter, 1.0, None)


def _inputs(classes: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, Options]]:
    targets = torch.zeros(64, dtype=torch.int64)
    plain = Options(None, -100, 0.0, 0.0, None, "mean", None)
    heavy = Options(torch.ones(classes), -100, 0.1, 1e-4, 30.0, "mean", None)
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.zeros(64, classes, dtype=dtype)
        for name, options in (("plain", plain), ("heavy", heavy)):
            yield f"cross_entropy, {classes} classes, {dtype}, {name}", logits, targets, options


def every_form() -> Iterator[Variant]:
    """Cross entropy in every form and dtype for every launch choice, and each option alone for
    some."""
    plain = Options(None, -100, 0.0, 0.0, None, "mean", None)
    for classes in CLASSES:
        targets = torch.zeros(64, dtype=torch.int64)
        meter = Meter("cpu", topk=(5,))
        heavy = plain._replace(
            weight=torch.ones(classes), label_smoothing=0.1, z_loss=1e-4, softcap=30.0
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            logits = torch.zeros(64, classes, dtype=dtype)
            for options in (plain, heavy):
                name = (
                    f"cross_entropy, {classes} classes, {dtype}, "
                    f"{'plain' if options is plain else 'heavy'}"
                )
                yield from _on_an_h200(
                    f"{name}, step", cross_entropy.step, logits, targets, options, meter, 1.0, None
                )
                yield from _on_an_h200(
                    f"{name}, autograd", _autograd, logits, targets, options, meter
                )
    for classes in (1000, 50257):
        yield from _single_options(classes, plain)
    many = torch.zeros(70_000, 10)
    targets = torch.zeros(70_000, dtype=torch.int64)
    yield from _on_an_h200(
        "many rows", cross_entropy.step, many, targets, plain, Meter("cpu"), 1.0, None
    )


def _single_options(classes: int, plain: Options) -> Iterator[Variant]:
    logits = torch.zeros(4, 16, classes, dtype=torch.bfloat16)
    targets = torch.zeros(4, 16, dtype=torch.int64)
    meter = Meter("cpu")
    number = torch.ones(())
    options = {
        "weight": plain._replace(weight=torch.ones(classes)),
        "smoothing": plain._replace(label_smoothing=0.1),
        "z-loss": plain._replace(z_loss=1e-4),
        "softcap": plain._replace(softcap=30.0),
        "sum": plain._replace(reduction="sum"),
        "normalizer": plain._replace(normalizer=3.0),
        "tensors": plain._replace(
            label_smoothing=number, z_loss=number, softcap=number, normalizer=number
        ),
    }
    for name, chosen in options.items():
        title = f"cross_entropy, {classes} classes, {name}"
        yield from _on_an_h200(
            f"{title}, step", cross_entropy.step, logits, targets, chosen, meter, number, None
        )
        yield from _on_an_h200(f"{title}, autograd", _autograd, logits, targets, chosen, meter)
    title = f"cross_entropy, {classes} classes"
    step = cross_entropy.step
    each = plain._replace(reduction="none")
    yield from _on_an_h200(f"{title}, a loss per row", _autograd, logits, targets, each, meter)
    for dtype in (torch.int32, torch.uint8):
        yield from _on_an_h200(
            f"{title}, {dtype} targets", step, logits, targets.to(dtype), plain, meter, 1.0, None
        )
    yield from _on_an_h200(f"{title}, no meter", step, logits, targets, plain, None, 1.0, None)
    shifted = logits[:, :-1], targets[:, 1:]
    yield from _on_an_h200(f"{title}, shifted sequence", step, *shifted, plain, meter, 1.0, None)
    yield from _on_an_h200(
        f"{title}, record", cross_entropy.record, number, logits, targets, meter, plain
    )


def _on_an_h200(name: str, function: Callable[..., Any], *arguments: Any) -> list[Variant]:
    with mock.patch.object(cross_entropy, "_device", return_value=(132, 50 << 20)):
        return recorded(name, lambda: function(*arguments))


def _autograd(logits: torch.Tensor, targets: torch.Tensor, options: Options, meter: Meter) -> None:
    loss, kept = cross_entropy.forward(logits, targets, options, meter, for_backward=True)
    cross_entropy.forward(logits, targets, options, meter, for_backward=False)
    cross_entropy.backward(torch.ones_like(loss), logits, targets, kept, options)


def token_logprobs_variants() -> Iterator[Variant]:
    """Both passes for every size of block, with and without entropies."""
    for classes in LOGPROB_CLASSES:
        for dtype in (torch.bfloat16, torch.float32):
            for entropy in (True, False):
                name = f"token_logprobs, {classes} classes, {dtype}"
                name += ", entropy" if entropy else ""
                logits = torch.zeros(64, classes, dtype=dtype)
                yield from recorded(
                    name, lambda logits=logits, entropy=entropy: _logprobs(logits, entropy)
                )


def _logprobs(logits: torch.Tensor, entropy: bool) -> None:
    targets = torch.zeros(len(logits), dtype=torch.int64)
    options = LogprobOptions(1.0, -100)
    numbers = torch.zeros(len(logits))
    entropies = numbers if entropy else None
    row_sums = torch.zeros(len(logits), 2)
    token_logprobs.forward(logits, targets, options, numbers, entropies, row_sums)
    token_logprobs.backward(
        logits, targets, options, entropies, row_sums, numbers, entropies, logits
    )


VARIANTS: tuple[Callable[[], Iterator[Variant]], ...] = (
    grad_stats_variants,
    cross_entropy_variants,
    token_logprobs_variants,
)


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """A variant as Triton compiles it for one GPU."""
    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    return compile_ahead(source, target=target, options=variant.options)


def resources(variant: Variant, target: GPUTarget) -> dict[str, Any]:
    """Compile for one GPU. Bytes on the stack are those that do not fit into registers."""
    made = compiled(variant, target)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(\w+):(\d+)", usage[usage.index("REG:") :]))
    return {
        "variant": variant.name,
        "sm": target.arch,
        "registers": int(found["REG"]),
        "shared_bytes": made.metadata.shared,
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        **variant.options,
    }


def measure() -> list[dict[str, Any]]:
    """The resources of every variant of every op for every target."""
    return [
        resources(variant, target)
        for variants in VARIANTS
        for variant in variants()
        for target in TARGETS
    ]


def main() -> None:
    """Compile everything, print a line per variant and target, and write the figures."""
    record.parser("triton_resources", __doc__).parse_args()
    rows = measure()
    for row in rows:
        print(row)
    print(record.write("triton-resources", rows))


if __name__ == "__main__":
    main()
