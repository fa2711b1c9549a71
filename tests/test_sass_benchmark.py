"""The static roofline: machine code is read and counted as by hand, and the model computes what its
formulas say.

Long file: one machine code after the other, each counted by hand.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sass import count, model, parse, table

ROOT = Path(__file__).parent.parent

COPY = """
	.section	.nv.info.copy,"",@"SHT_CUDA_INFO"
        /*0000*/ 	.byte	0x04
	.section	.text.copy,"ax",@progbits
        .global         copy
copy:
.text.copy:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 EXIT ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0040*/                   ISETP.GE.AND P0, PT, R0, 0x8, PT ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/              @!P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_1:
        /*0080*/                   BRA `(.L_x_1);
	.section	.text.other,"ax",@progbits
other:
.text.other:
        /*0000*/                   EXIT ;
"""

# A loop over rows around a loop over elements whose ragged edge has loads of single elements.
ROWS = """
	.section	.text.rows,"ax",@progbits
.text.rows:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.row:
        /*0010*/                   LDG.E.64 R10, desc[UR4][R8.64] ;
        /*0020*/                   ISETP.GE.U32.AND P1, PT, R10, 0x10, PT ;
.inner:
        /*0030*/               @P0 BRA P3, `(.ragged) ;
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/                   BRA `(.use) ;
.ragged:
        /*0060*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0070*/                   LDG.E.U16 R5, desc[UR4][R2.64+0x2] ;
.use:
        /*0080*/                   BRA.U !UP0, `(.without) ;
        /*0090*/                   FADD R7, R7, R7 ;
.without:
        /*00a0*/               @P2 BRA `(.skip) ;
        /*00b0*/                   IMAD.U32 R6, R4, 0x10000, RZ ;
        /*00c0*/                   MUFU.EX2 R6, R6 ;
.skip:
        /*00d0*/                   ISETP.NE.AND P4, PT, R3, RZ, PT ;
        /*00e0*/               @P4 BRA `(.inner) ;
        /*00f0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0100*/                   MEMBAR.ALL.GPU ;
        /*0110*/               @P1 BRA `(.row) ;
        /*0120*/                   EXIT ;
"""


def graph_of(text: str, name: str) -> list[parse.Block]:
    return parse.blocks(parse.functions(text)[name])


def instructions(*lines: str) -> list[parse.Instruction]:
    numbered = [f"/*{16 * place:04x}*/ {line} ;" for place, line in enumerate(lines)]
    (block, *_) = parse.blocks(numbered)
    return list(block.instructions)


def test_functions_and_blocks_are_those_of_the_text() -> None:
    assert set(parse.functions(COPY)) == {"copy", "other"}
    graph = graph_of(COPY, "copy")
    assert [len(block.instructions) for block in graph] == [2, 5, 1, 1, 0]
    assert [block.successors for block in graph] == [(1,), (1, 2), (), (3,), ()]
    load = graph[1].instructions[0]
    assert (load.guard, load.opcode, load.name) == ("", "LDG.E.128", "LDG")
    assert graph[1].instructions[-1].guard == "!P0"


def test_a_branch_to_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match=r"a branch to a label .* got 'BRA `\(\.L_x_9\)'"):
        parse.blocks(["/*0000*/ BRA `(.L_x_9) ;"])


def test_loops_are_natural_and_reachable() -> None:
    (loop,) = parse.loops(graph_of(COPY, "copy"))  # not the one behind the end
    assert (loop.header, loop.body) == (1, {1})
    graph = graph_of(ROWS, "rows")
    outer, inner = parse.loops(graph)
    assert inner.body < outer.body
    assert parse.innermost([outer, inner]) == [inner]
    assert count.element_loops(graph, 2) == [inner]
    assert count.row_loop(graph, [inner]) == outer


def test_the_hot_path_is_wide_and_works_and_leaves_out_options() -> None:
    graph = graph_of(ROWS, "rows")
    outer, inner = parse.loops(graph)
    path = count.hot_path(graph, inner)
    assert [i.name for i in path] == [
        *("BRA", "LDG", "BRA", "BRA"),  # wide, not ragged
        *("BRA", "IMAD", "MUFU"),  # without the option; with the work
        *("ISETP", "BRA"),
    ]
    around = count.count(count.row_path(graph, outer, [inner], False))
    assert (around.barriers, around.memory_barriers, around.waits) == (1, 1, 1)
    assert around.loads == {8: 1}


# The compiler executes stores and then leaves, both by P1; else the edge of a row comes.
EDGE = """
	.section	.text.edge,"ax",@progbits
.text.edge:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.again:
        /*0010*/               @P1 LDG.E.U16 R8, desc[UR4][R6.64] ;
        /*0020*/                   ISETP.GE.AND P1, PT, R0, 0x8, PT ;
        /*0030*/              @!P1 STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0040*/               @P1 LDG.E.U8 R9, desc[UR4][R6.64] ;
        /*0050*/              @!P1 BRA `(.next) ;
        /*0060*/               @P2 STG.E.U16 desc[UR4][R2.64], R4 ;
.next:
        /*0070*/               @P0 BRA `(.again) ;
        /*0080*/                   EXIT ;
"""


def test_a_branch_tells_which_guarded_instructions_are_executed() -> None:
    graph = graph_of(EDGE, "edge")
    assert [i.guard for i in parse.executed(graph, 1, 3)] == ["P1", "", "!P1", "!PT", "!P1"]
    assert [i.guard for i in parse.executed(graph, 1, 2)] == ["P1", "", "!PT", "P1", "!P1"]
    (loop,) = parse.loops(graph)
    found = count.count(count.hot_path(graph, loop))
    assert (found.instructions, found.loads, found.stores) == (6, {2: 1}, {2: 1})


def test_of_accesses_under_opposite_guards_the_wide_ones_are_on_the_path() -> None:
    found = count.count(
        instructions(
            "@P0 STG.E.128 desc[UR4][R2.64], R4",
            *("@!P0 STG.E desc[UR4][R2.64], R4",) * 4,
            "@P1 STG.E desc[UR4][R8.64], R4",
        )
    )
    assert (found.instructions, found.stores) == (6, {4: 1, 16: 1})


def test_loops_for_the_rest_of_a_row_and_for_class_weights_are_left_out() -> None:
    load, use, store = "LDG.E.128 R4, desc[UR4][R2.64]", "MUFU.EX2 R6, R4", "STG.E [R2.64], R4"
    lines = [
        (load, load, use),  # reads most of a row
        (load, use),  # and the rest
        (load, load, load, load),  # class weights
        (load, use, *(store,) * 4),
        (store, use),
    ]
    found = [count.count(instructions(*some)) for some in lines]
    assert count.main_loops(found) == [found[0], found[3]]
    assert count.main_loops([found[2]]) == [found[2]]


def test_a_program_without_a_loop_is_a_path_of_its_own() -> None:
    lines = [
        "/*0000*/ LDG.E R4, desc[UR4][R2.64] ;",
        "/*0010*/ @P0 BRA `(.end) ;",
        "/*0020*/ STG.E desc[UR4][R2.64], R4 ;",
        ".end:",
        "/*0030*/ EXIT ;",
        ".never:",
        "/*0040*/ BRA `(.never) ;",
    ]
    graph = parse.blocks(lines)
    assert parse.loops(graph) == []
    assert [i.name for i in count.hot_path(*parse.program(graph))] == ["LDG", "BRA", "STG", "EXIT"]


def test_a_copy_is_counted_as_by_hand() -> None:
    graph = graph_of(COPY, "copy")
    found = count.count(count.hot_path(graph, parse.loops(graph)[0]))
    assert found.instructions == 5
    assert (found.loads, found.stores) == ({16: 1}, {16: 1})
    assert (found.loaded, found.stored, found.waits) == (16, 16, 1)
    assert count.elements(found, 2) == 8
    assert found.purposes == {"load and store": 2, "address and control": 3}
    assert found.units == {"load/store": 2, "integer": 2, "none": 1}


@pytest.mark.parametrize(
    ("line", "purpose"),
    [
        ("PRMT R33, R4, 0x7632, R33", "convert"),
        ("IMAD.U32 R33, R4, 0x10000, RZ", "convert"),
        ("IMAD.SHL.U32 R33, R4, 0x10000, RZ", "convert"),
        ("SHF.L.U32 R33, R4, 0x10, RZ", "convert"),
        ("LOP3.LUT R5, R4, 0xffff0000, RZ, 0xc0, !PT", "convert"),
        ("F2FP.BF16.F32.PACK_AB R4, R5, R4", "convert"),
        ("HADD2.F32 R5, -RZ, R4.H0_H0", "convert"),
        ("F2F.F64.F32 R6, R4", "convert"),
        ("FSETP.GT.AND P2, PT, |R18|, 8.5e+37, PT", "compare"),
        ("FMNMX R45, R4, R37, !PT", "compare"),
        ("MUFU.EX2 R37, R4", "exponential"),
        ("FFMA R49, R38, R49, 0.133", "add and multiply"),
        ("@!P4 FMUL R34, R34, 0.5", "add and multiply"),
        ("DFMA R4, R6, R6, R4", "add and multiply"),
        ("HSETP2.BF16_V2.GT.OR P6, PT, R6.H1_H1, R33.H0_H0, P6", "rank"),
        ("ISETP.LT.U32.AND P3, PT, R2, 0x7d, !P0", "rank"),
        ("@P3 VIADD R5, R5, 0x1", "rank"),
        ("PLOP3.LUT P0, PT, P0, P1, PT, 0xa8, 0x0", "rank"),
        ("VIADD R5, R5, 0x1", "address and control"),
        ("IMAD.WIDE.U32 R34, R2, 0x10, R32", "address and control"),
        ("ISETP.LT.U32.AND P3, PT, R2, 0x7d, PT", "address and control"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "address and control"),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R35], desc[UR22][R10.64]", "load and store"),
        ("SHFL.BFLY PT, R50, R47, 0x4, 0x1f", "load and store"),
        ("STS.128 [R5], R8", "load and store"),
    ],
)
def test_purposes(line: str, purpose: str) -> None:
    (instruction,) = instructions(line)
    assert count.purpose(instruction) == purpose


@pytest.mark.parametrize(
    ("opcode", "bytes_"),
    [
        ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E.U8", 1),
        ("LDG.E", 4),
        ("LDG.E.64.STRONG.GPU", 8),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("LDG.E.ENL2.256", 32),
    ],
)
def test_widths(opcode: str, bytes_: int) -> None:
    (instruction,) = instructions(f"{opcode} R0, desc[UR22][R10.64]")
    assert count.width(instruction) == bytes_


def load(register: int) -> str:
    return f"LDG.E.128 R{register}, desc[UR4][R2.64]"


def use(register: int) -> str:
    return f"FADD R1, R1, R{register}"


@pytest.mark.parametrize(
    ("lines", "waits"),
    [
        ([load(4), use(4), load(8), use(8)], 2),
        ([load(4), load(8), use(4), use(8)], 1),  # the second came with the first
        ([load(4), use(8), use(3)], 0),
        ([load(4), use(7)], 1),  # the load writes R4 to R7
        ([load(4), "STG.E.128 desc[UR4][R2.64], R1"], 1),  # the store reads R1 to R4
        ([load(4), "DADD R8, R8, R2"], 0),
        ([load(4), "DADD R8, R8, R3"], 1),  # reads R3 and R4
        # A value for the next trip is waited for where it is moved.
        ([load(8), use(4), "MOV R4, R8"], 1),
        # Two copies may stay in flight: with the third it waits, until all have come.
        (["LDGSTS.E.128 [R5], desc[UR4][R2.64]", "LDGDEPBAR", "DEPBAR.LE SB0, 0x2"], 1 / 3),
    ],
)
def test_waits(lines: list[str], waits: float) -> None:
    assert count.count(instructions(*lines)).waits == pytest.approx(waits)


def test_dtypes_are_known_by_their_conversions() -> None:
    assert count.loaded_dtype(instructions("HADD2.F32 R5, -RZ, R4.H0_H0")) == "float16"
    assert count.loaded_dtype(instructions("IMAD.U32 R5, R4, 0x10000, RZ")) == "bfloat16"
    single = instructions("F2F.F64.F32 R6, R4", "DFMA R8, R6, R6, R8")
    assert count.loaded_dtype(single) == "float32"
    assert count.loaded_dtype(instructions("DFMA R8, R6, R6, R8")) == "float64"


H200 = model.CHIPS[90]


@pytest.mark.parametrize(
    ("registers", "threads", "shared_bytes", "blocks"),
    [
        (32, 256, 0, 8),  # threads: 2048 / 256
        (33, 1024, 0, 1),  # 33 registers take the room of 40: 65536 / (1280 x 32)
        (128, 256, 0, 2),  # registers: 65536 / (4096 x 8)
        (32, 32, 0, 32),  # blocks
        (32, 256, 100 << 10, 2),  # shared memory: 228 / 101
        (255, 1024, 0, 0),
    ],
)
def test_resident_blocks(registers: int, threads: int, shared_bytes: int, blocks: int) -> None:
    assert model.resident_blocks(registers, threads, shared_bytes, H200) == blocks


def test_a_cluster_lies_within_a_group_of_multiprocessors() -> None:
    assert H200.multiprocessors == 132
    assert model.resident_clusters(1, 8, H200) == 16  # 2 in each group; 132 / 8 would be 16.5
    assert model.resident_clusters(2, 8, H200) == 32
    assert model.resident_clusters(1, 1, H200) == 132


def work(**changes: object) -> model.Work:
    """A copy in bfloat16 that nothing but memory bounds."""
    plain: dict[str, object] = {
        "size": 2,
        "row": 8192,
        "issued": {"issue": 1.0},
        "passes": 1,
        "writes": True,
        "waits": 0.0,
        "block_elements": 8192,
        "blocks": 2,
    }
    return model.Work(**{**plain, **changes})  # type: ignore[arg-type]


def test_a_copy_is_bound_by_memory() -> None:
    assert model.bound(work(), H200) == model.Bound(1, "memory")
    assert model.bound(work(writes=False), H200) == model.Bound(1, "memory")


def test_instructions_bound_where_they_need_longer_than_the_memory() -> None:
    # 0.89 x 4.8e12 / 4 bytes are 1.068e12 elements per second; 132 x 128 x 1.98e9 / 60 are 5.58e11.
    found = model.bound(work(issued={"issue": 60.0}), H200)
    assert found.by == "issue"
    assert found.share == pytest.approx(132 * 128 * 1.98e9 / 60 / 1.068e12)
    # Half of the instructions in a unit of 16 lanes take four times as long.
    slow = model.bound(work(issued={"issue": 60.0, "special": 30.0, "none": 1e9}), H200)
    assert slow.by == "special"
    assert slow.share == pytest.approx(found.share / 4)


def test_latency_bounds_where_little_is_in_flight() -> None:
    # Per multiprocessor, 2 blocks of 8192 elements each wait 16 times.
    found = model.bound(work(waits=16.0), H200)
    rate = 132 * 2 * 8192 / (16 * model.LATENCY)
    assert found.by == "latency"
    assert found.share == pytest.approx(rate / 1.068e12)


def test_a_second_pass_is_free_while_the_rows_stay_in_the_cache() -> None:
    assert model.bound(work(passes=2), H200).share == 1
    long = model.bound(work(passes=2, row=262144), H200)  # 138 MB in flight
    assert (long.by, long.share) == ("memory", pytest.approx(2 / 3))
    together = work(passes=2, row=262144, cluster=8)  # an eighth of the rows
    assert model.bound(together, H200).share == 1


ROW = {
    "kernel": "cross_entropy, 8192 classes, bfloat16, plain, step",
    "backend": "cuda",
    "sm": 90,
    "instructions": 52.5,
    "purposes": {"convert": 4.0},
    "passes": [
        {"loads": {"16": 4}, "stores": {}},
        {"loads": {}, "stores": {"2": 6, "4": 1}},
    ],
    "bytes_in_flight": 8192,
    "barriers": 3,
    "memory_barriers": None,
    "registers": 96,
    "blocks": 2,
    "share": 0.59,
    "bound_by": "issue",
}


def test_tables_have_a_line_for_each_usual_kernel() -> None:
    rows = [ROW, {**ROW, "sm": 80}, {**ROW, "kernel": "cross_entropy, 10 classes, float16, x"}]
    figures = {"compilers": "nvcc 13.0", "rows": rows}
    *lines, line, _, compilers = table.table(figures).splitlines()
    assert compilers == "Compiled with nvcc 13.0."
    assert len(lines) == 2
    assert line == (
        "| cross_entropy, 8192 classes, bfloat16 | cuda | 52.5 | 16 | 2, 4 | 8 | 3 |  | 96 | 2 "
        "| 59 % | issue |"
    )
    *_, line = table.by_purpose(figures).splitlines()
    assert line.endswith("| cuda | 4.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |")


SQUARES = """
extern "C" __global__ void squares(const uint4* x, uint4* y, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const uint4 a = x[i];
    y[i] = {a.x * a.x, a.y * a.y, a.z * a.z, a.w * a.w};
  }
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_a_compiled_loop_has_its_loads_and_stores(tmp_path: Path, sm: int) -> None:
    knobs = pytest.importorskip("triton.knobs")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    (tmp_path / "squares.cu").write_text(SQUARES)
    command = ["nvcc", f"-arch=sm_{sm}", "-cubin", "squares.cu", "-o", "squares.cubin"]
    subprocess.run(command, cwd=tmp_path, check=True)
    command = [knobs.nvidia.nvdisasm.path, "-c", "squares.cubin"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    graph = graph_of(text, "squares")
    found = [count.count(count.hot_path(graph, at)) for at in count.element_loops(graph, 4)]
    assert found
    for loop in found:  # the compiler may have unrolled it, with a loop for the rest
        assert set(loop.loads) == set(loop.stores) == {16}
        assert loop.loaded == loop.stored
        elements = count.elements(loop, 4)
        assert elements == loop.loaded / 4
        assert 6 / 4 <= loop.instructions / elements < 8
        assert loop.waits == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_judges_kernels_of_both_backends() -> None:
    pytest.importorskip("triton")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = """
import json, sys
from dataclasses import asdict
from benchmarks.sass.judge import judge
from benchmarks.sass.kernels import subjects
rows = [asdict(judge(s)) for b in ("cuda", "triton") for s in subjects(90, b, "grad_stats")]
more = {"triton": "cross_entropy, 8192 classes, bfloat16", "cuda": "token_logprobs"}
more = [s for backend, only in more.items() for s in subjects(90, backend, only)]
assert len(more) == 16
rows += [asdict(judge(s)) for s in more]
print(json.dumps(rows))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["backend"] for row in rows} == {"cuda", "triton"}
    for row in rows:
        assert row["spilled_bytes"] == 0
        assert 0 < row["share"] <= 1
        assert 1 < row["instructions"] < 200
        assert row["bytes_in_flight"] > 0
        assert row["blocks"] >= 1
