"""The parts of the GPU benchmark that need no GPU: arguments, shapes, table, and its refusal."""

import json
from pathlib import Path
from typing import Any

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


FIGURES = {
    "milliseconds": 0.123456,
    "gb_per_s": 1234.56,
    "share_of_copy": 0.5,
    "launches": 1,
    "syncs": 0,
    "host_microseconds": 20.0,
    "replayed_milliseconds": 0.01,
}


def test_table_has_a_line_for_every_candidate_whatever_became_of_it() -> None:
    candidates = {
        "triton": FIGURES,
        "cuda": {"error": "AssertionError: the norms differ"},
        "compile": {**FIGURES, "replayed_milliseconds": "RuntimeError: not permitted"},
    }
    row = {"shape": "bf16:8x10", "candidates": candidates, "missing": {"liger": "not installed"}}
    head, rule, ours, uncaptured, theirs, failed = gpu.table([row]).splitlines()
    assert ours == "| bf16:8x10 | triton | 0.1235 | 0.01 | 1235 | 0.5 | 1 | 0 | 20 |"
    assert "| 0.1235 | RuntimeError: not permitted | 1235 |" in uncaptured
    assert theirs.startswith("| bf16:8x10 | liger | not installed |")
    assert failed.startswith("| bf16:8x10 | cuda | AssertionError: the norms differ |")
    assert len({line.count("|") for line in (head, rule, ours, uncaptured, failed, theirs)}) == 1


def test_inputs_take_turns_until_none_is_in_the_cache() -> None:
    cache = 50 << 20
    assert gpu.copies(200 << 20, cache) == 1
    for size in (100 << 20, 16 << 20, 1_310_720, 1):
        number = gpu.copies(size, cache)
        # Between two uses of an input, the others pass through the cache twice, or there are as
        # many as allowed.
        assert (number - 1) * size >= 2 * cache or number == gpu.MOST_COPIES


@pytest.fixture
def without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace measurement on the device: the work is done once, and a number is returned."""

    def once(call: Any, inputs: Any, repeats: int = 1) -> float:
        call(inputs[0])
        return 1.0

    for name in ("device_milliseconds", "host_microseconds", "replayed_milliseconds"):
        monkeypatch.setattr(gpu, name, once)
    for name in ("launches", "syncs"):
        monkeypatch.setattr(gpu, name, lambda call: 1)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 1e12)


def test_a_candidate_that_fails_is_a_row_and_the_others_are_measured(
    without_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(batch: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    def check(name: str) -> None:
        assert name != "differs", "the gradient differs"

    def capture(call: Any, inputs: Any, repeats: int) -> float:
        if call is print:
            raise RuntimeError("not while capturing")
        return 0.5

    candidates = {"fails": fails, "differs": id, "prints": print, "good": id}
    monkeypatch.setattr(gpu, "loss_subject", lambda shape: gpu.Subject([1, 2], candidates, check))
    monkeypatch.setattr(gpu, "replayed_milliseconds", capture)
    rows = gpu.measure("bf16:8x10", 1e12)["candidates"]
    assert rows["fails"] == {"error": "OutOfMemoryError: no memory"}
    assert rows["differs"]["error"].startswith("AssertionError: the gradient differs")
    assert rows["prints"]["replayed_milliseconds"] == "RuntimeError: not while capturing"
    assert (rows["good"]["milliseconds"], rows["good"]["replayed_milliseconds"]) == (1.0, 0.5)


def test_figures_are_on_disk_after_every_shape(
    without_a_device: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = []

    def subject(shape: gpu.Shape) -> gpu.Subject:
        if (tmp_path / "gpu.json").exists():
            written.append(len(json.loads((tmp_path / "gpu.json").read_text())["figures"]["rows"]))
        if shape.columns == 3:
            raise torch.OutOfMemoryError("no memory for the inputs")
        return gpu.Subject([1], {"good": id})

    monkeypatch.setattr(gpu, "loss_subject", subject)
    rows = gpu.measure_all(["bf16:8x2", "bf16:8x3", "bf16:8x4"], tmp_path)
    assert written == [1, 2]
    assert json.loads((tmp_path / "gpu.json").read_text())["figures"]["rows"] == rows
    assert rows[1]["missing"] == {"all": "OutOfMemoryError: no memory for the inputs"}
    assert [list(row["candidates"]) for row in rows] == [["good"], [], ["good"]]


def test_what_is_missing_is_said() -> None:
    assert gpu.rival("no_such_library.kernels", "cross_entropy") is None
    assert gpu.rival("torch.nn.functional", "cross_entropy") is torch.nn.functional.cross_entropy
    names, refused = gpu.served("grad_stats", torch.bfloat16)
    assert {*names, *refused} == set(gpu.BACKENDS)
    assert all(refused.values())


def test_without_a_gpu_it_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        SystemExit, match=r"^the benchmark `gpu` needs a CUDA device, and torch finds none here$"
    ):
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
