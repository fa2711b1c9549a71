"""Outputs and batches of many kinds: what is taken for logits, inputs and targets, and what is
counted."""

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from esper_kernels.ops.cross_entropy import reference
from esper_train import CompileConfig, EpochResult, TrainConfig, evaluate, train_one_epoch
from esper_train.train.batches import cloned, moved, read_batch, tensors
from esper_train.train.forward import logits_of
from tests.helpers.linear import INPUTS, TARGETS, linear
from tests.helpers.problems import PROBLEMS, conv, curves, images, perceptron, rows
from tests.helpers.taped import assert_same, captured, measures

LOGITS = torch.randn(2, 3)
CONFIG = TrainConfig()


class Named(NamedTuple):
    hidden: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        SimpleNamespace(logits=LOGITS, loss=None),
        {"loss": None, "logits": LOGITS},
        UserDict(logits=LOGITS),
        (LOGITS, "hidden"),
        [LOGITS],
        Named(hidden=LOGITS + 1, logits=LOGITS),
    ],
)
def test_logits_are_found_in_what_models_return(output: object) -> None:
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "described"),
    [
        (None, "got None"),
        ({"scores": LOGITS}, "got a dict with 'scores'"),
        (("text", LOGITS), r"got a tuple \(str, Tensor\)"),
        ((), r"got a tuple \(\)"),
        (SimpleNamespace(scores=LOGITS), "got a SimpleNamespace"),
    ],
)
def test_an_output_without_logits_is_described(output: object, described: str) -> None:
    with pytest.raises(TypeError, match=rf"{described} from the model; pass forward="):
        logits_of(output)


@pytest.mark.parametrize("key", ["labels", "targets", "label", "target"])
def test_targets_of_a_dict_have_one_of_four_names(key: str) -> None:
    inputs, targets = read_batch({"x": INPUTS, key: TARGETS, "note": "kept"})
    assert targets is TARGETS
    assert inputs == {"x": INPUTS, "note": "kept"}


def test_the_first_of_the_names_has_the_targets_and_the_rest_are_inputs() -> None:
    inputs, targets = read_batch({"label": INPUTS, "labels": TARGETS})
    assert targets is TARGETS
    assert set(inputs) == {"label"}


def test_what_moves_and_what_stays() -> None:
    """A packed sequence keeps its lengths on the CPU, where torch wants them."""
    packed = pack_sequence([INPUTS[:3], INPUTS[:2]])
    nest = {"pair": (INPUTS, [TARGETS]), "packed": packed, "note": "kept", "none": None, "n": 3}
    found = moved(UserDict(nest), torch.device("meta"))
    assert type(found) is dict
    assert [x.device.type for x in (found["pair"][0], found["pair"][1][0])] == ["meta"] * 2
    assert (found["packed"].data.device.type, found["packed"].batch_sizes.device.type) == (
        "meta",
        "cpu",
    )
    assert (found["note"], found["none"], found["n"]) == ("kept", None, 3)
    assert moved(INPUTS, None) is INPUTS
    named = moved(Named(INPUTS, TARGETS), torch.device("meta"))
    assert type(named) is Named


def test_copies_share_no_memory() -> None:
    nest = {"a": [INPUTS, (TARGETS,)]}
    copies = cloned(nest)
    for copy, original in zip(tensors(copies), tensors(nest), strict=True):
        assert torch.equal(copy, original)
        assert copy.data_ptr() != original.data_ptr()


@pytest.mark.parametrize(
    "read", [lambda batch: batch, lambda batch: [batch, batch], lambda batch: (batch,)]
)
def test_a_batch_function_that_gives_no_pair_is_refused(
    read: Callable[[Any], Any],
) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"task_type": "classification", "batch": read}
    error = r"expected \(inputs, targets\) from batch="
    with pytest.raises(TypeError, match=error):
        evaluate(model, [INPUTS], CONFIG, **options)
    with pytest.raises(TypeError, match=error):
        train_one_epoch(model, [INPUTS], optimizer, CONFIG, **options)


def train(
    model: nn.Module, data: Any, task_type: str, config: TrainConfig = CONFIG, **options: Any
) -> EpochResult:
    """An epoch that measures and changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return train_one_epoch(model, data, optimizer, config, task_type=task_type, **options)


def test_a_regression_counts_rows_and_no_classes() -> None:
    data = curves()
    data[-1][0][2, 0] = torch.nan
    options: dict[str, Any] = {"criterion": lambda y, t: F.mse_loss(y.nan_to_num(), t)}
    for result in (
        train(perceptron(2), data, "regression", TrainConfig(on_bad_numbers="warn"), **options),
        evaluate(perceptron(2), data, CONFIG, task_type="regression", **options),
    ):
        assert (result.accuracy, result.correct) == (None, {})
        assert (result.valid, result.nonfinite, result.bad_targets) == (15, 1, 0)
        assert result.backend == "eager criterion"
    assert result.right.shape == (0,)
    assert result.contribution("none") is None


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_outputs_of_a_regression_have_any_shape(n: int, shape: tuple[int, ...]) -> None:
    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    x = torch.randn(n, *shape)
    full = torch.randn(4, *shape)
    batches = [(full, full), (x, x)]
    result = train(Reshaped(), batches, "regression", criterion=nn.MSELoss(reduction="sum"))
    assert (result.valid, result.batches) == (4 + n, 2)


def test_a_regression_needs_a_criterion() -> None:
    with pytest.raises(ValueError, match=r"'regression' needs a criterion, .*nn.MSELoss"):
        train(perceptron(), curves(), "regression")


def test_targets_of_a_regression_may_be_whatever_the_criterion_takes() -> None:
    data = [(x, {"a": x[:, :1], "b": (x[:, 1:2],)}) for x, _ in rows()]

    def criterion(y: Tensor, t: dict[str, Any]) -> Tensor:
        return F.mse_loss(y[:, :1], t["a"]) + F.l1_loss(y[:, 1:], t["b"][0])

    model = perceptron(2)
    result = train(model, data, "regression", criterion=criterion)
    expected = sum(criterion(model(x), t).item() * len(x) for x, t in data) / 15
    assert result.loss == pytest.approx(expected, rel=1e-6)
    with pytest.raises(TypeError, match=r"expects targets as a tensor, got a dict; pass batch="):
        train(model, data, "classification", criterion=criterion)


def test_soft_targets_are_counted_by_their_largest_share() -> None:
    model = perceptron()
    data = rows(mixed=True)
    result = train(model, data, "classification")
    right = [model(x).argmax(1) == t.argmax(1) for x, t in data]
    assert result.correct == {1: int(torch.cat(right).sum())}
    assert result.accuracy == result.correct[1] / 15
    assert result.backend == "eager (soft targets)"
    measured = evaluate(model, data, CONFIG, task_type="classification")
    assert torch.equal(measured.right, torch.cat(right))
    assert measured.backend == "eager (soft targets)"
    assert evaluate(model, rows(), CONFIG, task_type="classification").backend == "cpp"


def test_shares_of_tokens_teach_a_student() -> None:
    """Distillation: targets [N, T, V] of a teacher."""
    teacher, student = nn.Linear(4, 5), nn.Linear(4, 5)
    data = [(x, teacher(x).softmax(-1).detach()) for x in torch.randn(2, 3, 6, 4)]
    result = train(student, data, "lm")
    expected = [F.cross_entropy(student(x).flatten(0, 1), t.flatten(0, 1)).item() for x, t in data]
    assert result.loss == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert result.valid == 36


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_soft_targets_is_a_mean_for_every_reduction(reduction: str) -> None:
    model = perceptron()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    result = train(model, rows(mixed=True), "classification", criterion=criterion)
    expected = [F.cross_entropy(model(x), t).item() * len(x) for x, t in rows(mixed=True)]
    assert result.loss == pytest.approx(sum(expected) / 15, rel=1e-6)


def test_floating_targets_that_are_no_shares_are_refused_with_a_way_out() -> None:
    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(logits[:, 0], targets)

    data = [(x, t.float()) for x, t in rows()]
    with pytest.raises(TypeError, match=r"shares of the classes.*\(6, 3\).*'regression'"):
        train(perceptron(), data, "classification", criterion=criterion)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dense_targets_are_counted_by_place(layout: torch.memory_format) -> None:
    model = conv().eval()
    data = [(x.contiguous(memory_format=layout), t) for x, t in images()]
    model.to(memory_format=layout)  # type: ignore[call-overload]
    result = evaluate(model, data, CONFIG, task_type="dense")
    right = [(model(x).argmax(1) == t).flatten() for x, t in data]
    assert torch.equal(result.right, torch.cat(right))
    assert (result.valid, result.correct[1]) == (147, int(torch.cat(right).sum()))
    assert result.backend == "cpp"


@pytest.mark.parametrize(
    ("task_type", "shape"), [("dense", r"\[N, V, d, ...\]"), ("lm", r"\[N, T, V\]")]
)
def test_logits_of_another_rank_are_refused_with_a_way_out(task_type: str, shape: str) -> None:
    with pytest.raises(ValueError, match=rf"expects logits {shape}, got \(6, 3\).*'regression'"):
        train(perceptron(), rows(), task_type)


def test_logits_of_tokens_are_told_the_task_types_that_take_them() -> None:
    words = (
        r"got \(6, 2, 3\).*; 'lm' takes \[N, T, V\], 'dense' takes \[N, V, d, ...\], 'regression'"
    )
    tokens = [(torch.randn(6, 2, 4), torch.zeros(6, 2, dtype=torch.int64))]
    with pytest.raises(ValueError, match=words):
        train(nn.Linear(4, 3), tokens, "classification")


class Scaled(nn.Module):
    """A model that takes alpha beside inputs that are a dict, and writes over them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, alpha: dict[str, float] | None = None) -> dict[str, Tensor]:
        x *= 2
        return {"logits": self.head(x) * (1.0 if alpha is None else alpha["slot"])}


@pytest.mark.parametrize("own", [True, False])
def test_variants_are_measured_on_the_same_dict_of_inputs(own: bool) -> None:
    model = Scaled()

    def forward(model: nn.Module, inputs: Any, alpha: Any = None) -> Any:
        return model(inputs["x"], alpha)

    data = [{"x": x.clone(), "labels": t} for x, t in rows()]
    result = evaluate(
        model,
        data,
        CONFIG,
        task_type="classification",
        variants={"half": {"slot": 0.5}, "whole": {"slot": 1.0}},
        forward=forward if own else None,
    )
    logits = [model.head(2 * x) for x, _ in rows()]
    for name, alpha in (("half", 0.5), ("whole", 1.0)):
        expected = [
            F.cross_entropy(alpha * y, t, reduction="sum").item()
            for y, (_, t) in zip(logits, rows(), strict=True)
        ]
        assert result.variants[name].loss == pytest.approx(sum(expected) / 15, rel=1e-6)
    assert result.loss == result.variants["whole"].loss


@pytest.mark.parametrize(
    "name",
    ["dict batches, .logits", "dense", "dense, shares", "MixUp", "MixUp, weighted and smoothed"],
)
def test_captured_steps_take_any_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs find the tensors of a dict where the first batch's were; another form runs
    eagerly. Of soft targets, rows are counted by the largest share."""
    # targets on a GPU are not looked at on the host
    monkeypatch.setattr(reference, "refuse_bad_targets", lambda *_: None)
    problem = PROBLEMS[name]
    found = []
    for capture in (True, False):
        config = TrainConfig(capture=capture)
        model = problem.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-4, fused=True)
        if capture:
            step, _ = captured(config)
            criterion = problem.options.get("criterion")
            step.loss.__init__(problem.task_type, config, criterion)  # type: ignore[misc]
        batches = [*problem.batches[:2] * 4, problem.batches[2]]
        results = [
            train_one_epoch(
                model,
                batches,
                optimizer,
                config,
                task_type=problem.task_type,
                step=step if capture else None,
                **({} if capture else problem.options),
            )
            for _ in range(2)
        ]
        found.append((model.state_dict(), [repr(measures(result)) for result in results]))
        backend = "cpp" if name.startswith("d") and "shares" not in name else "eager (soft targets)"
        assert [result.backend for result in results] == [backend] * 2
        assert results[1].replayed == (8 if capture else 0)
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_compiled_forward_takes_dicts_and_forwards_of_ones_own_without_recompiling() -> None:
    torch._dynamo.reset()
    for name in ("dict batches, .logits", "forward and batch of one's own"):
        problem = PROBLEMS[name]
        graphs = []

        def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
            graphs.append(graph)  # noqa: B023
            return graph.forward

        config = TrainConfig(compile=CompileConfig(enabled=True, backend=count))
        model = problem.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_one_epoch(
            model,
            problem.batches * 3,
            optimizer,
            config,
            task_type=problem.task_type,
            **problem.options,
        )
        assert len(graphs) == 1
