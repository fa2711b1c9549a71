"""The tables of the static roofline in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import record

PURPOSES = (
    "convert", "compare", "exponential", "add and multiply", "rank", "load and store",
    "address and control",
)  # fmt: skip


def table(figures: Mapping[str, Any], sm: int = 90) -> str:
    """A line per kernel in its usual form, for one architecture."""
    head = [
        "kernel", "backend", "instructions per element", "loads", "stores", "KiB in flight",
        "barriers per row", "memory barriers", "registers", "blocks", "share of a copy", "bound by",
    ]  # fmt: skip
    lines = record.markdown([head, *(_line(row) for row in usual(figures["rows"], sm))])
    return f"{lines}\n\nCompiled with {figures['compilers']}."


def usual(rows: Sequence[Mapping[str, Any]], sm: int = 90) -> list[Mapping[str, Any]]:
    """The kernels for an architecture in bfloat16 or float32, in a step without options or
    measures; of token_logprobs, those with entropies."""
    left_out = (
        "softcap",
        "heavy",
        "autograd",
        "measured",
        " float16,",
        "inv_scale b",
        "inv_scale f",
    )
    return [
        row
        for row in rows
        if row["sm"] == sm
        and not any(word in f"{row['kernel']}," for word in left_out)
        and not ("logprobs" in row["kernel"] and "entropy" not in row["kernel"])
    ]


def by_purpose(figures: Mapping[str, Any]) -> str:
    """The instructions per element of the same kernels, by purpose."""
    lines = [
        [row["kernel"], row["backend"], *(f"{row['purposes'].get(p, 0):.1f}" for p in PURPOSES)]
        for row in usual(figures["rows"])
    ]
    return record.markdown([["kernel", "backend", *PURPOSES], *lines])


def _line(row: Mapping[str, Any]) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    return [
        row["kernel"].removesuffix(", plain, step"),
        row["backend"],
        f"{row['instructions']:.1f}",
        _widths(row, "loads"),
        _widths(row, "stores"),
        f"{row['bytes_in_flight'] / 1024:.0f}",
        number(row["barriers"]),
        number(row["memory_barriers"]),
        str(row["registers"]),
        str(row["blocks"]),
        f"{100 * row['share']:.0f} %",
        row["bound_by"],
    ]


def _widths(row: Mapping[str, Any], name: str) -> str:
    """Bytes of the accesses of all passes, such as "16" or "2, 4"."""
    found = {int(width) for one in row["passes"] for width in one[name]}
    return ", ".join(map(str, sorted(found)))
