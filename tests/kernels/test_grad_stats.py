"""Gradient statistics and clipping, against hand-computed numbers and float64.

Long file: one op against one truth, with shared cases.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_kernels import GradHealth, KernelConfig, clip_grad_norm_, grad_stats
from esper_kernels.testing import SyncCounter, grad_samples

INF = torch.inf
NAN = torch.nan
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def parameter(grad: Tensor | None) -> Tensor:
    result = torch.zeros(
        0 if grad is None else grad.shape, dtype=None if grad is None else grad.dtype
    )
    result.grad = grad
    return result


@pytest.mark.parametrize("name", grad_samples())
def test_samples_agree_with_plain_python(config: KernelConfig, device: str, name: str) -> None:
    grads = grad_samples(device)[name]
    if config.backend == "cuda" and any(
        grad is not None and grad.dtype == torch.float64 for grad in grads
    ):
        with pytest.raises(ValueError, match="cuda: float64 is served by"):
            grad_stats(grads, config=config)
        return
    stats = grad_stats(grads, config=config)
    for place, grad in enumerate(grads):
        values = [] if grad is None else grad.double().flatten().tolist()
        unknown = any(map(math.isnan, values))
        norm = NAN if unknown else math.hypot(*values)
        largest = NAN if unknown else max(map(abs, values), default=0.0)
        assert stats.norms[place].item() == pytest.approx(norm, rel=1e-12, nan_ok=True)
        assert stats.max_abs[place].item() == pytest.approx(largest, rel=0, nan_ok=True)
        assert stats.zeros[place].item() == sum(value == 0 for value in values)
        assert stats.nans[place].item() == sum(map(math.isnan, values))
        assert stats.infs[place].item() == sum(map(math.isinf, values))
    everything = [v for grad in grads if grad is not None for v in grad.double().flatten().tolist()]
    total = NAN if any(map(math.isnan, everything)) else math.hypot(*everything)
    assert stats.total_norm.item() == pytest.approx(total, rel=1e-12, nan_ok=True)
    assert stats.compute().gradient_norm == pytest.approx(total, rel=1e-12, nan_ok=True)
    assert stats.found_inf.item() == float(not all(map(math.isfinite, everything)))
    assert stats.compute().elements == len(everything)


def test_results_are_device_tensors_of_the_promised_dtypes(
    config: KernelConfig, device: str
) -> None:
    stats = grad_stats([torch.ones(2, device=device), None], config=config)
    for name in ("norms", "max_abs", "zeros", "nans", "infs", "total_norm", "found_inf"):
        value = getattr(stats, name)
        assert value.device.type == device
        assert value.shape == (() if name in ("total_norm", "found_inf") else (2,))
    assert (stats.norms.dtype, stats.zeros.dtype) == (torch.float64, torch.int64)
    assert (stats.total_norm.dtype, stats.found_inf.dtype) == (torch.float64, torch.float32)


def test_norm_of_float16_list_does_not_overflow(config: KernelConfig) -> None:
    """20 tensors x 400 values of 1000: each norm 1000 sqrt(400), together 1000 sqrt(8000) =
    89442.719."""
    health = grad_stats(grad_samples()["float16 beyond its range"], config=config).compute()
    assert health.gradient_norm == pytest.approx(89442.71909999159)
    assert health.max_layer_norm == pytest.approx(20_000)


def test_norms_of_1e20_and_1e_minus_30(config: KernelConfig) -> None:
    big, small = grad_stats(grad_samples()["1e20 and 1e-30"], config=config).norms.tolist()
    assert big == pytest.approx(3.1622776601683795e20, rel=1e-7)  # float32 holds 1e20 to 6e-8
    assert small == pytest.approx(3.1622776601683795e-30, rel=1e-7)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_minus_zero_is_a_zero_and_a_denormal_is_not(
    config: KernelConfig, dtype: torch.dtype
) -> None:
    if config.backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter takes bfloat16 denormals for 0")
    denormal = torch.finfo(dtype).smallest_normal / 4
    stats = grad_stats([tensor(0.0, -0.0, denormal, -denormal, 1.0, dtype=dtype)], config=config)
    assert stats.zeros.tolist() == [2]


def test_nan_and_inf_propagate(config: KernelConfig) -> None:
    stats = grad_stats(
        {"a": [tensor(NAN, INF), tensor(INF)], "b": [tensor(-INF, 1.0)]}, config=config
    )
    health = stats.compute()
    assert [str(x) for x in stats.norms.tolist()] == ["nan", "inf", "inf"]
    assert [str(x) for x in stats.max_abs.tolist()] == ["nan", "inf", "inf"]
    assert (health.nan_count, health.inf_count, health.gradient_health) == (1, 3, 0.0)
    for value in (
        health.gradient_norm,
        health.min_layer_norm,
        health.max_layer_norm,
        health.norm_ratio,
    ):
        assert math.isnan(value)
    assert health.groups["b"].gradient_norm == INF
    assert health.has_exploding
    assert stats.found_inf.item() == 1


@pytest.mark.parametrize("values", [(1.0, NAN, 2.0), (INF, NAN), (NAN, 1.0)])
def test_nan_shows_in_norm_minimum_and_maximum_at_any_place(
    config: KernelConfig, values: tuple[float, ...]
) -> None:
    health = grad_stats([tensor(value) for value in values], config=config).compute()
    for value in (
        health.gradient_norm,
        health.min_layer_norm,
        health.max_layer_norm,
        health.norm_ratio,
    ):
        assert math.isnan(value)


def test_health_by_hand(config: KernelConfig) -> None:
    """Norms 5, 0 (vanishing), 130 (exploding), 12: health 1 - 0.5/4 - 0.8/4 = 0.675."""
    grads = [tensor(3.0, 4.0), tensor(0.0, 0.0), tensor(50.0, 120.0), tensor(0.0, -12.0)]
    assert grad_stats(grads, config=config).compute() == GradHealth(
        gradient_norm=pytest.approx(130.64838307457157),  # sqrt(25 + 16900 + 144)
        gradient_health=pytest.approx(0.675),
        has_vanishing=True,
        has_exploding=True,
        min_layer_norm=0.0,
        max_layer_norm=130.0,
        norm_ratio=pytest.approx(1.3e12),  # 130 / 1e-10
        zero_grad_fraction=3 / 8,
        nan_count=0,
        inf_count=0,
        tensors=4,
        elements=8,
    )


def test_health_is_never_below_zero(config: KernelConfig) -> None:
    """A threshold order under which every tensor both vanishes and explodes: 1 - 0.5 - 0.8 clamps
    to 0."""
    stats = grad_stats([tensor(1.0)], vanishing=2.0, exploding=0.5, config=config)
    assert stats.compute().gradient_health == 0


def test_thresholds_are_strict(config: KernelConfig) -> None:
    at_both = grad_stats([tensor(100.0), tensor(0.25)], vanishing=0.25, config=config).compute()
    assert (at_both.has_exploding, at_both.has_vanishing) == (False, False)
    above = grad_stats([tensor(100.00001)], config=config).compute()
    assert above.has_exploding
    assert not above.has_vanishing
    assert grad_stats([tensor(9.9e-8)], config=config).compute().has_vanishing


@pytest.mark.parametrize("grads", [[], [None], [None, torch.zeros(0), torch.zeros(3, 0)]], ids=str)
def test_nothing_measured(config: KernelConfig, grads: list[Tensor | None]) -> None:
    stats = grad_stats(grads, config=config)
    assert stats.norms.tolist() == [0.0] * len(grads)
    health = stats.compute()
    assert health == GradHealth(
        gradient_norm=0.0,
        gradient_health=1.0,
        has_vanishing=False,
        has_exploding=False,
        min_layer_norm=0.0,
        max_layer_norm=0.0,
        norm_ratio=1.0,
        zero_grad_fraction=0.0,
        nan_count=0,
        inf_count=0,
        tensors=0,
        elements=0,
    )


def test_none_and_empty_keep_their_place_and_enter_no_count(config: KernelConfig) -> None:
    stats = grad_stats([None, tensor(3.0), torch.zeros(0), tensor(4.0)], config=config)
    assert stats.norms.tolist() == [0, 3, 0, 4]
    health = stats.compute()
    assert (health.tensors, health.min_layer_norm, health.norm_ratio) == (2, 3, 4 / 3)
    assert (health.gradient_norm, health.has_vanishing) == (5, False)


def test_groups_are_measured_apart_and_together(config: KernelConfig) -> None:
    groups: dict[str, list[Tensor | None]] = {
        "host": [tensor(3.0), tensor(4.0)],
        "r0c0": [None, tensor(0.0, 12.0)],
        "r0c1": [],
    }
    health = grad_stats(groups, config=config).compute()
    assert health.gradient_norm == 13
    assert list(health.groups) == ["host", "r0c0", "r0c1"]
    flat = [grad for members in groups.values() for grad in members]
    assert dataclasses.replace(health, groups={}) == grad_stats(flat, config=config).compute()
    for name, members in groups.items():
        assert health.groups[name] == grad_stats(members, config=config).compute()
    assert (health.groups["host"].gradient_norm, health.groups["r0c0"].zero_grad_fraction) == (
        5,
        0.5,
    )


def test_expanded_tensors_count_every_logical_element(config: KernelConfig) -> None:
    grad = torch.ones(1, 3).expand(100, 3)
    health = grad_stats([grad], config=config).compute()
    assert (health.elements, health.gradient_norm) == (300, pytest.approx(math.sqrt(300)))


def test_dense_tensors_in_any_order_are_not_copied(config: KernelConfig) -> None:
    channels_last = torch.randn(3, 5, 4, 7).to(memory_format=torch.channels_last)
    transposed = torch.randn(9, 4).t()
    gaps = torch.randn(9, 8)[:, ::2]
    for grads, copied in (([channels_last, transposed], False), ([gaps], True)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            stats = grad_stats(grads, config=config)
        norms = [grad.double().square().sum().sqrt().item() for grad in grads]
        assert stats.norms.tolist() == pytest.approx(norms, rel=1e-12)
        names = {event.key for event in profile.key_averages()}
        if config.backend != "eager":
            assert ("aten::clone" in names) == copied


def test_inv_scale_multiplies_every_value(config: KernelConfig) -> None:
    grads = [tensor(3.0, -4.0).half(), tensor(12.0), tensor(0.0)]
    stats = grad_stats(grads, inv_scale=torch.tensor(0.5), config=config)
    assert stats.norms.tolist() == [2.5, 6, 0]
    assert stats.max_abs.tolist() == [2, 6, 0]
    assert stats.total_norm.item() == 6.5
    assert stats.found_inf.item() == 0
    assert grads[0].tolist() == [3, -4]  # read, not scaled


def test_inv_scale_does_not_flush_small_values(config: KernelConfig) -> None:
    stats = grad_stats([tensor(1e-40)], inv_scale=torch.tensor(2.0**-16), config=config)
    assert stats.zeros.tolist() == [0]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_found_inf_is_the_scalers_flag(config: KernelConfig, value: float) -> None:
    stats = grad_stats(
        [tensor(1.0), tensor(1.0, value)], inv_scale=torch.tensor(0.5), config=config
    )
    assert stats.found_inf.item() == 1


def test_out_reuses_the_memory(config: KernelConfig) -> None:
    first = grad_stats([tensor(NAN), tensor(2.0)], config=config)
    pointers = (first.norms.data_ptr(), first.zeros.data_ptr(), first.found_inf.data_ptr())
    second = grad_stats(
        {"a": [tensor(0.0, 0.0)], "b": [None]}, vanishing=0.0, out=first, config=config
    )
    assert (
        second.norms.data_ptr(),
        second.zeros.data_ptr(),
        second.found_inf.data_ptr(),
    ) == pointers
    assert (second.norms.tolist(), second.zeros.tolist(), second.nans.tolist()) == (
        [0, 0],
        [2, 0],
        [0, 0],
    )
    assert second.found_inf.item() == 0
    assert list(second.compute().groups) == ["a", "b"]
    assert not second.compute().has_vanishing


def test_out_of_another_layout_is_refused(config: KernelConfig) -> None:
    earlier = grad_stats([tensor(2.0)], config=config)
    with pytest.raises(ValueError, match="out must be of 2 tensors on cpu, got 1 on cpu"):
        grad_stats([tensor(1.0), tensor(1.0)], out=earlier, config=config)
    assert earlier.norms.tolist() == [2]


@pytest.mark.parametrize(
    ("grads", "options", "error", "words"),
    [
        (torch.ones(2), {}, TypeError, "a sequence of tensors or None"),
        (torch.nn.Linear(1, 1), {}, TypeError, r"got Linear .*\[p\.grad for p in module"),
        ([torch.ones(2), 1.0], {}, TypeError, r"grads\[1\] must be a dense tensor or None.*float"),
        ([torch.ones(2).to_sparse()], {}, TypeError, r"grads\[0\] must be a dense tensor.*sparse"),
        (
            [*torch.nn.Linear(1, 1).parameters()],
            {},
            TypeError,
            r"nn.Parameter at place 0.*\[p.grad",
        ),
        (
            {"frozen": [None, torch.nn.Parameter(torch.ones(2), requires_grad=False)]},
            {},
            TypeError,
            "nn.Parameter at place 1",
        ),
        (
            [*torch.nn.Linear(1, 1).named_parameters()],
            {},
            TypeError,
            "got a tuple at place 0.*name: ",
        ),
        ([torch.ones(2).long()], {}, TypeError, r"grads\[0\] must be one of.*got torch.int64"),
        (
            [torch.ones(2), None, torch.ones(2, device="meta")],
            {},
            ValueError,
            "one device, got cpu.*place 2, meta",
        ),
        (
            [torch.ones(2)],
            {"inv_scale": torch.ones(1)},
            ValueError,
            "inv_scale as a tensor must be 0-d",
        ),
        ([torch.ones(2)], {"inv_scale": 0.5}, TypeError, "inv_scale must be a 0-d tensor"),
        (
            [torch.ones(2)],
            {"inv_scale": torch.ones((), device="meta")},
            ValueError,
            "device cpu, got meta",
        ),
    ],
)
def test_wrong_input_is_named(
    config: KernelConfig, grads: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        grad_stats(grads, **options, config=config)


def test_same_bits_at_any_thread_count(config: KernelConfig) -> None:
    grads = [torch.randn(200_001, generator=torch.Generator().manual_seed(0))]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(grad_stats(grads, config=config).norms)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


# --- clipping ---


def twins(*grads: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    return [parameter(g) for g in grads], [
        parameter(None if g is None else g.clone()) for g in grads
    ]


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_clip_equals_torch(config: KernelConfig, dtype: torch.dtype, max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 3), (50,), ())]
    ours, theirs = twins(*grads, None)
    norm = clip_grad_norm_(ours, max_norm, config=config)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, expected.double(), rtol=torch.finfo(dtype).eps, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_clip_reaches_max_norm_where_float16_would_overflow(config: KernelConfig) -> None:
    """Norm 89442.719, clipped to 1000: every 1000 becomes 11.18034."""
    params = [parameter(grad) for grad in grad_samples()["float16 beyond its range"]]
    assert clip_grad_norm_(params, 1000.0, config=config).item() == pytest.approx(89442.71909999159)
    assert params[0].grad is not None
    torch.testing.assert_close(params[0].grad, torch.full((400,), 11.18034).half())


def test_clip_of_mixed_dtypes_is_one_norm(config: KernelConfig) -> None:
    params = [
        parameter(torch.tensor([3.0], dtype=torch.float64)),
        parameter(torch.tensor([4.0]).bfloat16()),
    ]
    assert clip_grad_norm_(params, 2.5, config=config).item() == 5
    assert [p.grad.item() for p in params if p.grad is not None] == pytest.approx(
        [1.5, 2.0], rel=1e-6
    )


@pytest.mark.parametrize("value", [NAN, INF])
def test_clip_of_a_nonfinite_norm_is_as_in_torch(config: KernelConfig, value: float) -> None:
    ours, theirs = twins(tensor(1.0, value), tensor(2.0))
    norm = clip_grad_norm_(ours, 1.0, config=config)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(norm.float(), expected, equal_nan=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


def test_clip_may_raise_for_a_nonfinite_norm_before_scaling(config: KernelConfig) -> None:
    params, before = twins(tensor(1.0, INF), tensor(2.0))
    with pytest.raises(RuntimeError, match="not finite"):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True, config=config)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(params, before, strict=True))


def test_clip_uses_given_stats_and_does_not_sync(config: KernelConfig) -> None:
    params = [
        parameter(tensor(3.0)),
        parameter(None),
        parameter(tensor(4.0)),
        parameter(torch.zeros(0)),
    ]
    stats = grad_stats({"seed": [params[2].grad], "host": [params[0].grad]}, config=config)
    stats.total_norm.fill_(10.0)  # what is used, if the gradients are not read again
    with SyncCounter() as syncs:
        norm = clip_grad_norm_(params, 1.0, stats=stats, config=config)
    assert syncs.count == 0
    grad_stats([tensor(9.0), None], out=stats, config=config)
    assert norm.item() == 10.0  # not a view of memory that is used again
    torch.testing.assert_close(params[2].grad, tensor(0.4))


def test_clip_under_a_loss_scale_bounds_the_unscaled_norm(config: KernelConfig) -> None:
    param = parameter(tensor(3.0, 4.0) * 1024)
    stats = grad_stats([param.grad], inv_scale=torch.tensor(1 / 1024), config=config)
    assert clip_grad_norm_(param, 1.0, stats=stats, config=config).item() == 5
    assert param.grad is not None
    assert (param.grad / 1024).norm().item() == pytest.approx(1.0)


def test_clip_refuses_stats_of_other_gradients(config: KernelConfig) -> None:
    param = parameter(tensor(3.0, 4.0))
    for other in ([tensor(1.0)], [tensor(1.0, 1.0), tensor(1.0)], []):
        with pytest.raises(
            ValueError, match=f"stats are of {len(other)} tensors .* params have 1 gradients with 2"
        ):
            clip_grad_norm_([param], 1.0, stats=grad_stats(other, config=config), config=config)
    assert param.grad is not None
    assert param.grad.tolist() == [3, 4]


def test_clip_of_nothing_gives_zero(config: KernelConfig) -> None:
    assert clip_grad_norm_([], 1.0, config=config).item() == 0
    assert clip_grad_norm_([parameter(None)], 1.0, config=config).item() == 0


def test_clip_takes_a_generator_and_a_single_tensor(config: KernelConfig) -> None:
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    assert clip_grad_norm_(model.parameters(), 1.0, config=config) > 1
    assert clip_grad_norm_(
        (p for p in model.parameters()), 9.0, config=config
    ).item() == pytest.approx(1.0)
    assert clip_grad_norm_(model.weight, 9.0, config=config) < 1


def test_clip_counts_a_parameter_that_comes_twice_once(config: KernelConfig) -> None:
    """torch would give a norm of sqrt(50) and scale the gradient twice, to a norm of 0.1."""
    tied = parameter(tensor(3.0, 4.0))
    norm = clip_grad_norm_([tied, parameter(None), tied], 1.0, config=config)
    assert norm.item() == 5
    assert tied.grad is not None
    assert tied.grad.tolist() == pytest.approx([0.6, 0.8])
    stats = grad_stats([tied.grad], config=config)
    assert clip_grad_norm_([tied, tied], 0.5, stats=stats, config=config).item() == pytest.approx(1)
    assert tied.grad.tolist() == pytest.approx([0.3, 0.4], rel=1e-5)
    twice = grad_stats([tied.grad, tied.grad], config=config)
    with pytest.raises(ValueError, match=r"stats are of 2 tensors .* params have 1 gradients"):
        clip_grad_norm_([tied, tied], 0.5, stats=twice, config=config)


def test_clip_of_an_empty_generator_warns_as_torch_does(config: KernelConfig) -> None:
    used_up = (p for p in [parameter(tensor(3.0))])
    assert clip_grad_norm_(used_up, 1.0, config=config).item() == 3
    with pytest.warns(UserWarning, match="empty generator"):
        assert clip_grad_norm_(used_up, 1.0, config=config).item() == 0
    with pytest.warns(UserWarning, match="empty generator"):
        torch.nn.utils.clip_grad_norm_(used_up, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model: model,
        lambda model: model.named_parameters(),
        lambda model: dict(model.named_parameters()),
        lambda model: [*model.parameters(), None],
        lambda model: 3.0,
    ],
    ids=["module", "named", "dict", "None among them", "number"],
)
def test_clip_refuses_params_that_are_not_tensors(config: KernelConfig, wrong: Any) -> None:
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(TypeError, match="params must be a tensor or an iterable of tensors"):
        clip_grad_norm_(wrong(model), 1.0, config=config)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_clip_of_a_gradient_that_has_a_graph(config: KernelConfig) -> None:
    leaf = torch.nn.Parameter(torch.ones(2))
    (leaf.square() * tensor(3.0, 4.0)).sum().backward(create_graph=True)
    graph = leaf.grad
    assert graph is not None
    assert graph.requires_grad
    assert clip_grad_norm_([leaf], 1.0, config=config).item() == 10
    assert torch.is_grad_enabled()
    assert leaf.grad is graph
    assert graph.detach().norm().item() == pytest.approx(1.0)
