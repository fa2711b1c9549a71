"""The choice of a backend: pure, in the open, and never swapped silently."""

import dataclasses
import subprocess
import sys

import pytest
import torch

import esper_kernels
from esper_kernels import KernelConfig, cross_entropy, info, select_backend
from esper_kernels.backends import OPS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("device_type", "refused"), [("cpu", ("cpp",)), ("cuda", ("cuda", "triton")), ("xpu", ("triton",))]
)
def test_auto_takes_the_first_that_serves_and_keeps_the_reasons(
    op: str, device_type: str, refused: tuple[str, ...]
) -> None:
    choice = select_backend(op, device_type, torch.float32)
    assert choice.name == "eager"
    assert choice.refused == tuple((name, "not part of esper-kernels 0.1.0") for name in refused)


def test_by_name_is_served_or_raises_with_the_reason() -> None:
    eager = KernelConfig(backend="eager")
    assert select_backend("cross_entropy", "cpu", torch.float64, eager).refused == ()
    for name in ("cpp", "triton", "cuda"):
        config = KernelConfig(backend=name)
        with pytest.raises(ValueError, match=f"backend='{name}': {name}: not part of esper-kernels"):
            select_backend("grad_stats", "cpu", torch.float32, config)
        with pytest.raises(ValueError, match="not part of esper-kernels"):
            cross_entropy(torch.zeros(1, 2), torch.tensor([0]), config=config)


def test_device_without_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"triton: not part.*eager: sums are float64, which device type 'mps' lacks"):
        select_backend("cross_entropy", "mps", torch.float32)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'auto', 'eager', 'cpp', 'triton', 'cuda'.*got 'fast'"):
        KernelConfig(backend="fast")
    with pytest.raises(ValueError, match=r"cross_entropy.*grad_stats.*got 'softmax'"):
        select_backend("softmax", "cpu", torch.float32)


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
    assert rows["cross_entropy", "cpu", "float32"].backend == "eager"
    assert rows["grad_stats", "mps", "float32"].backend is None


def test_info_is_printed_without_a_warning() -> None:
    command = [sys.executable, "-W", "error", "-m", "esper_kernels.info"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("esper_kernels 0.1.0  torch ")
    assert any(line.split()[:3] == ["cross_entropy", "cpu", "eager"] for line in lines)


def test_info_stays_a_function_when_its_module_is_imported() -> None:
    __import__("esper_kernels.info.__main__")
    assert callable(esper_kernels.info)


def test_public_names_are_exactly_these() -> None:
    names = "KernelConfig Meter MeterResult GradStats GradHealth cross_entropy cross_entropy_step record_loss"
    names += " grad_stats clip_grad_norm_ compute_all select_backend info __version__"
    assert set(esper_kernels.__all__) == set(names.split())
    assert all(hasattr(esper_kernels, name) for name in esper_kernels.__all__)
