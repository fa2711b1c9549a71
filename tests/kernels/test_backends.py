"""The choice of a backend: a pure function, visible to the user, never changed silently."""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import esper_kernels
from esper_kernels import KernelConfig, backends, cross_entropy, info, native, select_backend
from esper_kernels.backends import OPS
from esper_kernels.info import check as checks
from esper_kernels.ops.cross_entropy import cpp

Damage = Callable[[Path], object]
NOT_IN_CUDA = "vocab_parallel_cross_entropy"
WITH_KERNELS = [op for op in OPS if op != NOT_IN_CUDA]


def test_an_op_without_kernels_is_served_by_the_next_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "it has no kernels for logits whose classes are divided"
    with pytest.raises(ValueError, match=f"cuda: {reason}"):
        select_backend(NOT_IN_CUDA, "cuda", torch.float32, KernelConfig(backend="cuda"))
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    choice = backends._select(NOT_IN_CUDA, "cuda", torch.float32, KernelConfig())  # not cached
    assert choice.name == "eager"
    assert ("cuda", reason) in choice.refused


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_cpp_on_the_cpu(op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert select_backend(op, "cpu", dtype) == ("cpp", (), "auto")
    reason = "float64 is served by eager only"
    assert select_backend(op, "cpu", torch.float64) == ("eager", (("cpp", reason),), "auto")


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_auto_takes_the_first_that_serves_and_keeps_the_reasons(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    config = KernelConfig()  # of _select nothing is cached
    monkeypatch.setattr(native, "cuda_unavailable", lambda: None)
    assert backends._select(op, "cuda", torch.float32, config) == ("triton", (), "auto")
    assert select_backend(op, "xpu", torch.bfloat16) == ("triton", (), "auto")
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    choice = backends._select(op, "cuda", torch.float32, config)
    assert choice.name == "cuda"
    ((_, triton),) = choice.refused
    assert triton.startswith("triton does not import: ")
    monkeypatch.setattr(native, "cuda_unavailable", lambda: "no GPU")
    choice = backends._select(op, "cuda", torch.float32, config)
    assert choice.name == "eager"
    assert choice.refused == (("triton", triton), ("cuda", "no GPU"))


def test_by_name_is_served_or_raises_with_the_reason() -> None:
    eager = KernelConfig(backend="eager")
    assert select_backend("cross_entropy", "cpu", torch.float64, eager).refused == ()
    cuda = KernelConfig(backend="cuda")
    with pytest.raises(ValueError, match="backend='cuda': cuda: runs on CUDA only, not on cpu"):
        select_backend("grad_stats", "cpu", torch.float32, cuda)
    with pytest.raises(ValueError, match="runs on CUDA only, not on cpu"):
        cross_entropy(torch.zeros(1, 2), torch.tensor([0]), config=cuda)
    triton = KernelConfig(backend="triton")
    with pytest.raises(ValueError, match="triton: float64 is served by eager only"):
        select_backend("cross_entropy", "cuda", torch.float64, triton)
    with pytest.raises(
        ValueError, match="triton: runs on GPUs that Triton compiles for, not on mps"
    ):
        select_backend("grad_stats", "mps", torch.float32, triton)
    cpp = KernelConfig(backend="cpp")
    assert select_backend("cross_entropy", "cpu", torch.float32, cpp).name == "cpp"
    with pytest.raises(ValueError, match="cpp: float64 is served by eager only"):
        select_backend("cross_entropy", "cpu", torch.float64, cpp)
    with pytest.raises(ValueError, match="cpp: runs on the CPU only, not on cuda"):
        select_backend("cross_entropy", "cuda", torch.float32, cpp)


def test_triton_asks_for_the_compiler_of_its_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    missing = (
        "Triton needs a C compiler for its launcher, and there is no gcc and no clang; "
        "install one, or"
    )
    chosen = backends._select("cross_entropy", "cuda", torch.float32, KernelConfig())  # not cached
    assert chosen.name != "triton"
    assert dict(chosen.refused)["triton"].startswith(missing)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "CC='no-such-compiler' names none" in str(
        backends.refusal("cross_entropy", "triton", "cuda")
    )
    (tmp_path / "clang").touch(mode=0o755)
    assert "CC='no-such-compiler' names none" in str(
        backends.refusal("cross_entropy", "triton", "cuda")
    )
    monkeypatch.delenv("CC")
    assert "C compiler" not in str(backends.refusal("cross_entropy", "triton", "cuda"))
    monkeypatch.setattr(backends.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    needed = f"Triton needs Python's headers for its launcher, and there is no {tmp_path}/Python.h"
    assert str(backends.refusal("cross_entropy", "triton", "cuda")).startswith(needed)


def test_info_says_that_triton_lacks_a_compiler(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")
    }
    command = [sys.executable, "-m", "esper_kernels.info"]
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    row = next(
        line for line in done.stdout.splitlines() if line.split()[:2] == ["cross_entropy", "cuda"]
    )
    assert "(triton: Triton needs a C compiler for its launcher" in row


def test_the_compiler_of_the_launcher_is_a_constant_to_torch_compile() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if backends._no_launcher() is None else x + 2

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())).item() == (1 if backends._no_launcher() is None else 2)


def test_instruction_set_is_one_of_the_machine_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"'auto', 'avx512bf16', 'avx512', 'avx2', 'baseline'.*got 'sse'"
    ):
        KernelConfig(instruction_set="sse")
    assert "baseline" in native.INSTRUCTION_SETS
    monkeypatch.setattr(native, "INSTRUCTION_SETS", ("baseline",))
    with pytest.raises(
        ValueError, match="instruction_set='avx2' cannot run here; there are: baseline"
    ):
        # not cached
        backends._select(
            "cross_entropy", "cpu", torch.float32, KernelConfig(instruction_set="avx2")
        )


def without_library(package: Path) -> None:
    (package / "lib/esper_cpu.so").unlink()


def spoilt(name: str) -> Damage:
    return lambda package: (package / name).write_bytes(b"no library")


def of_another_machine(package: Path) -> None:
    library = bytearray((package / "lib/esper_cpu.so").read_bytes())
    # the ELF header's machine
    library[18:20] = (183 if platform.machine() != "aarch64" else 62).to_bytes(2, "little")
    (package / "lib/esper_cpu.so").write_bytes(library)


def beside_an_old_torch(package: Path) -> None:
    code = "import torch\ntorch.__version__ = torch.torch_version.TorchVersion('2.9.1+cpu')\n"
    (package / "__init__.py").write_text(code + (package / "__init__.py").read_text())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_library, "the CPU kernels are not built (pure Python install)"),
        (spoilt("lib/esper_cpu.so"), "the CPU kernels do not load: {package}/lib/esper_cpu.so: "),
        pytest.param(
            of_another_machine,
            "the CPU kernels do not load: {package}/lib/esper_cpu.so: ",
            marks=pytest.mark.slow,
        ),
        (beside_an_old_torch, "the compiled kernels need torch 2.10 or newer, this is 2.9.1+cpu"),
    ],
    ids=["no library", "spoilt library", "another machine", "old torch"],
)
def test_where_the_kernels_cannot_load_eager_serves_and_says_why(
    damage: Damage, reason: str, tmp_path: Path
) -> None:
    package = tmp_path / "esper_kernels"
    shutil.copytree(Path(esper_kernels.__file__).parent, package)
    damage(package)
    command = [sys.executable, "-m", "esper_kernels.info"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    row = next(
        line for line in done.stdout.splitlines() if line.split()[:2] == ["cross_entropy", "cpu"]
    )
    assert row.split()[2] == "eager"
    assert f"(cpp: {reason.format(package=package)}" in row


def test_where_the_cuda_kernels_cannot_load_the_reason_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load_cuda = native._load_cuda.__wrapped__
    monkeypatch.setattr(torch.version, "cuda", None)
    assert load_cuda() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_cuda() == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "_CUDA_LIBRARY", tmp_path / "esper_cuda.so")
    assert (
        load_cuda() == "the CUDA kernels are not built; a CUDA toolkit has to be there at the build"
    )
    (tmp_path / "esper_cuda.so").write_bytes(b"no library")
    assert load_cuda().startswith("the CUDA kernels do not load: ")
    assert "\n" not in load_cuda()
    monkeypatch.setattr(native, "UNAVAILABLE", "no compiler")
    assert load_cuda() == "no compiler"


def test_device_without_float64_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"triton: runs on GPUs.*eager: sums are float64, which .* 'mps' lacks"
    ):
        select_backend("cross_entropy", "mps", torch.float32)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'auto', 'eager', 'cpp', 'triton', 'cuda'.*got 'fast'"):
        KernelConfig(backend="fast")
    with pytest.raises(ValueError, match=r"cross_entropy.*grad_stats.*got 'softmax'"):
        select_backend("softmax", "cpu", torch.float32)
    with pytest.raises(TypeError, match=r"such as torch\.float32, got 'cpu' and 'float32'"):
        select_backend("cross_entropy", "cpu", "float32")  # type: ignore[arg-type]


def test_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KernelConfig().backend = "eager"  # type: ignore[misc]
    with pytest.raises(TypeError):
        KernelConfig("eager")  # type: ignore[call-arg]


def test_choice_is_a_cached_function_of_its_arguments() -> None:
    first = select_backend("grad_stats", "cpu", torch.float32, KernelConfig())
    assert select_backend("grad_stats", "cpu", torch.float32, KernelConfig()) is first
    assert select_backend("grad_stats", "cpu", torch.float32) is first


def test_info_has_a_row_for_every_op_device_and_dtype() -> None:
    facts = info()
    assert facts.versions["esper_kernels"] == esper_kernels.__version__ == "0.1.0"
    assert facts.versions["torch"] == torch.__version__
    rows = {(row.op, row.device_type, row.dtype): row for row in facts.choices}
    assert len(rows) == len(facts.choices) == len(OPS) * 4 * 4
    assert rows["cross_entropy", "cpu", "float32"].backend == "cpp"
    assert rows["cross_entropy", "cpu", "float64"].backend == "eager"
    assert rows["token_logprobs", "cpu", "bfloat16"].backend == "cpp"
    assert rows["grad_stats", "mps", "float32"].backend is None


def test_info_is_printed_without_a_warning() -> None:
    command = [sys.executable, "-W", "error", "-m", "esper_kernels.info"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("esper_kernels 0.1.0  torch ")
    assert any(line.split()[:3] == ["cross_entropy", "cpu", "cpp"] for line in lines)


def test_check_compares_the_backends_that_serve_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_SHAPES", ((4, 10), (3, 2000)))
    lines = {line: good for line, good in checks.check() if line.startswith("cpu cpp")}
    assert lines["cpu cpp bfloat16 3 x 2000: ok"]
    assert all(lines.values())

    def wrong(*arguments: Any) -> torch.Tensor:
        return step(*arguments).mul_(1.01)

    step = cpp.step
    monkeypatch.setattr(cpp, "step", wrong)
    assert not any(good for line, good in checks.check() if "cpp float32" in line)


def test_check_compares_batches_with_two_targets_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: Any, targets: Any, options: Any, *arguments: Any) -> torch.Tensor:
        grad = step(logits, targets, options, *arguments)
        return grad if options.second is None else grad.mul_(1.01)

    step = cpp.step
    monkeypatch.setattr(checks, "_SHAPES", ((4, 10),))
    monkeypatch.setattr(cpp, "step", wrong)
    line, agreed = next(found for found in checks.check() if "cpp float32" in found[0])
    assert not agreed
    assert "two targets" in line


@pytest.mark.slow
def test_check_is_a_command() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "esper_kernels.info", "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu cpp float16 2 x 262144: ok" in done.stdout


def test_info_stays_a_function_when_its_module_is_imported() -> None:
    __import__("esper_kernels.info.__main__")
    assert callable(esper_kernels.info)


def test_public_names_are_exactly_these() -> None:
    names = (
        "KernelConfig Meter MeterResult GradStats GradHealth cross_entropy cross_entropy_step "
        "record_loss"
    )
    names += " linear_cross_entropy linear_cross_entropy_step LinearGradients "
    names += "CrossEntropyLoss LinearCrossEntropyLoss token_logprobs linear_token_logprobs"
    names += " ClassShard vocab_parallel_cross_entropy vocab_parallel_cross_entropy_step"
    names += " Averages Calibration ClassMeasures Measured"
    names += " grad_stats clip_grad_norm_ compute_all select_backend info __version__"
    assert set(esper_kernels.__all__) == set(names.split())
    assert all(hasattr(esper_kernels, name) for name in esper_kernels.__all__)
