"""What of the GPU benchmark needs no GPU: its arguments, its shapes, its table, and what it says without one."""

import pytest
import torch

from benchmarks import gpu
from esper_kernels.testing import SyncCounter


def test_shapes_are_read_and_wrong_ones_named() -> None:
    assert gpu.parse("bf16:8192x1000") == (False, torch.bfloat16, 8192, 1000)
    assert gpu.parse("grads:fp32:60x20000") == (True, torch.float32, 60, 20000)
    assert gpu.parse("fp16:3x5").bytes == 30
    for text in ("8192x1000", "bf16:8192", "int8:4x4", "bf16:0x4", "grads:4x4", "fp32:4x4x4", ""):
        with pytest.raises(ValueError, match=r"ROWSxCLASSES or grads:DTYPE:TENSORSxSIZE, got"):
            gpu.parse(text)


def test_all_classes_are_measured_in_both_dtypes_and_fit() -> None:
    found = [gpu.parse(text) for text in gpu.shapes()]
    logits = [shape for shape in found if not shape.grads]
    assert {(s.dtype, s.columns) for s in logits} == {
        (dtype, v) for dtype in (torch.bfloat16, torch.float32) for v in gpu.CLASSES
    }
    assert all(shape.rows >= 1024 and shape.bytes <= gpu.LARGEST for shape in logits)
    assert sum(shape.grads for shape in found) == len(gpu.GRADS)


def test_table_has_a_line_for_every_candidate_and_for_every_missing_one() -> None:
    figures = {"milliseconds": 0.123456, "gb_per_s": 1234.56, "share_of_copy": 0.5, "launches": 1, "syncs": 0}
    candidates = {"triton": {**figures, "host_microseconds": 20.0}}
    row = {"shape": "bf16:8x10", "candidates": candidates, "missing": {"liger": "not installed"}}
    head, rule, ours, theirs = gpu.table([row]).splitlines()
    assert ours == "| bf16:8x10 | triton | 0.1235 | 1235 | 0.5 | 1 | 0 | 20 |"
    assert theirs.startswith("| bf16:8x10 | liger | not installed |")
    assert len({line.count("|") for line in (head, rule, ours, theirs)}) == 1


def test_what_is_missing_is_said() -> None:
    assert gpu.rival("no_such_library.kernels", "cross_entropy") is None
    assert gpu.rival("torch.nn.functional", "cross_entropy") is torch.nn.functional.cross_entropy
    names, refused = gpu.served("grad_stats", torch.bfloat16)
    assert {*names, *refused} == set(gpu.BACKENDS)
    assert all(refused.values())


def test_without_a_gpu_it_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^the benchmark `gpu` needs a CUDA device, and torch finds none here$"):
        gpu.main([])
    with pytest.raises(SystemExit, match="got 'bf16'"):
        gpu.main(["bf16"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_counters_count_on_a_gpu() -> None:
    x = torch.ones(5, device="cuda")
    with SyncCounter() as counter:
        x.sum().item()
    assert gpu.syncs(lambda: x.sum().item()) == counter.count == 1
    assert gpu.syncs(lambda: x.add_(1)) == 0
    assert gpu.launches(lambda: x.add_(1).mul_(2)) == 2
