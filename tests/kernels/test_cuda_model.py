"""The static model of the CUDA kernels: reading SASS, executing it, occupancy, Little's law, and the comparison."""

from __future__ import annotations

import shutil
import struct
from collections import Counter
from dataclasses import replace

import cuda_check
import numpy as np
import pytest
from cuda_model import attention, gpus, launches, run, table
from cuda_model.attention import Documents, TritonKernel
from cuda_model.memory import Array, Memory, bank_conflicts
from cuda_model.operands import UNIFORM, UnknownInstructionError
from cuda_model.sass import (
    Instruction,
    count,
    every_loop,
    functions_of,
    loops,
    parse_function,
    parse_instruction,
    straight,
    unconditional,
)
from cuda_model.semantics import compile_instruction
from cuda_model.simulate import PARAMETERS, Counts, Kernel, Run


def program(text: str) -> list[Instruction]:
    """Return instructions from lines ``label: instruction``; a label stands for its address, in steps of 16 bytes."""
    lines = [line.strip() for line in text.strip().splitlines()]
    labels = {line.split(": ")[0]: 16 * n for n, line in enumerate(lines) if ": " in line}
    parsed = []
    for n, line in enumerate(lines):
        body = line.split(": ")[-1]
        for label, address in labels.items():
            body = body.replace(f"<{label}>", hex(address))
        parsed.append(parse_instruction(body, 16 * n))
    return parsed


# --- reading SASS -----------------------------------------------------------------------------------------------------

# cuobjdump prints this: the second word of the load says stall 4, sets scoreboard 2, waits for 0.
LISTING = """
		Function : first
        /*0000*/                   S2R R0, SR_TID.X ;                    /* 0x0000000000007919 */
                                                                         /* 0x000e220000002100 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64+0x10] ; /* 0x0000100402048981 */
                                                                         /* 0x001ea8000c1e1d00 */
		Function : second
        /*0000*/                   EXIT ;                                /* 0x000000000000794d */
                                                                         /* 0x000fea0003800000 */
"""


def test_instructions_have_their_operands_and_control() -> None:
    functions = functions_of(LISTING)
    assert list(functions) == ["first", "second"]
    special, load = parse_function(functions["first"])
    assert (special.sets, special.reads, special.stall, special.waits) == (0, 7, 1, ())
    assert (load.address, load.name, load.sets, load.stall, load.waits) == (0x10, "LDG.E.128", 2, 4, (0,))
    assert load.guard is not None
    assert (load.guard.index, load.guard.inverted) == (0, True)
    assert [o.kind for o in load.operands] == ["reg", "mem"]


@pytest.mark.parametrize(
    ("text", "kind", "index", "offset", "negative", "inverted"),
    [
        ("-R18.reuse", "reg", 18, 0, True, False),
        ("~URZ", "ureg", 63, 0, False, True),
        ("!UP3", "upred", 3, 0, False, True),
        ("c[0x0][0x210]", "const", 0, 0x210, False, False),
        ("-0x1f", "number", 0, -0x1F, False, False),
        ("-INF", "other", 0, 0, False, False),
    ],
)
def test_operands(text: str, kind: str, index: int, offset: int, negative: bool, inverted: bool) -> None:
    operand = parse_instruction(f"IADD3 R0, {text}").operands[1]
    assert (operand.kind, operand.index, operand.offset) == (kind, index, offset)
    assert (operand.negative, operand.inverted) == (negative, inverted)


NESTED = """
    MOV R0, 0x3
    outer: MOV R1, 0x2
    inner: IADD3 R1, R1, -0x1, RZ
    ISETP.NE.AND P0, PT, R1, RZ, PT
    @P0 BRA <inner>
    ISETP.GT.AND P1, PT, R0, 0x2, PT
    @P1 BRA <skip>
    FADD R2, R2, 1
    skip: IADD3 R0, R0, -0x1, RZ
    ISETP.NE.AND P0, PT, R0, RZ, PT
    @P0 BRA <outer>
    EXIT
    end: BRA <end>
"""


def test_loops_nest_and_padding_is_none() -> None:
    instructions = program(NESTED)
    (outer,) = loops(instructions)
    assert (outer.head, len(outer.body)) == (1, 10)
    (inner,) = outer.inner
    assert inner.body == {2, 3, 4}
    assert outer.own() == {1, 5, 6, 7, 8, 9, 10}
    assert [loop.head for loop in every_loop([outer])] == [1, 2]
    assert count(instructions, outer.own(), "ISETP") == 2


def test_what_every_iteration_executes() -> None:
    instructions = program(NESTED)
    (outer,) = loops(instructions)
    assert outer.own() - unconditional(instructions, outer) == {7}
    assert unconditional(instructions, outer.inner[0]) == {2, 3, 4}
    assert straight(instructions) == {0, 11}


# --- executing it -----------------------------------------------------------------------------------------------------


def execute(text: str, *, parameters: bytes = b"", memory: Memory | None = None, threads: int = 32) -> Counts:
    own = Run(Kernel(program(text)), threads, (1, 1), parameters, memory or Memory(), 500.0, 1200.0)
    return own.blocks([(0, 0)])


def test_lanes_come_together_again_and_loops_end() -> None:
    counts = execute("""
        S2R R0, SR_TID.X
        MOV R1, RZ
        loop: IADD3 R1, R1, 0x1, RZ
        ISETP.LT.U32.AND P0, PT, R1, 0xa, PT
        @P0 BRA <loop>
        BSSY B0, <join>
        LOP3.LUT R2, R0, 0x1, RZ, 0xc0, !PT
        ISETP.NE.AND P1, PT, R2, RZ, PT
        @P1 BRA <odd>
        FADD R3, R3, 1
        BRA <join>
        odd: FMUL R3, R3, 2
        join: BSYNC B0
        MUFU.RCP R3, R3
        EXIT
    """)
    assert counts.issued["IADD3"] == 10
    assert (counts.issued["FADD"], counts.issued["FMUL"]) == (1, 1)  # both sides ran, each with half of the lanes
    assert counts.issued["MUFU"] == counts.issued["EXIT"] == 1  # then all lanes ran once


COPY = """
    S2R R0, SR_TID.X
    ULDC.64 UR4, c[0x0][0x208]
    LDC.64 R2, c[0x0][0x210]
    LDC.64 R4, c[0x0][0x218]
    IMAD.WIDE.U32 R2, R0, 0x4, R2
    IMAD.WIDE.U32 R4, R0, 0x4, R4
    LDG.E R6, desc[UR4][R2.64]
    IADD3 R6, R6, 0x5, RZ
    STG.E desc[UR4][R4.64], R6
    EXIT
"""


def test_memory_moves_and_is_counted() -> None:
    assert PARAMETERS == 0x210
    memory, values = Memory(), np.arange(32, dtype=np.uint32)
    source, target = launches.data("from", values), launches.data("to", np.zeros(32, np.uint32))
    counts = execute(COPY, parameters=launches.pack([source, target], memory.place), memory=memory)
    assert target.data is not None
    assert target.data.view(np.uint32).tolist() == list(range(5, 37))
    assert (counts.loaded, counts.stored) == (Counter({"from": 128}), Counter({"to": 128}))
    assert (counts.wavefronts, counts.l2_bytes) == (2, 256)


def test_an_access_outside_of_the_arrays_is_an_error() -> None:
    memory = Memory()
    parameters = launches.pack([Array("from", 64), Array("to", 128)], memory.place)
    with pytest.raises(IndexError, match="64 bytes into from, of 64"):
        execute(COPY, parameters=parameters, memory=memory)


def loads(*lines: str) -> str:
    """Return code with R2 at an array, R4 behind it: a load sets its line's scoreboard, ``!n`` waits for number n."""
    return "\n".join(("LDC.64 R2, c[0x0][0x210]", *lines, "EXIT"))


def test_loads_in_flight_together_are_one_trip() -> None:
    """Two loads that wait for each other take twice as long as two that do not."""

    def cycles(dependent: bool) -> tuple[float, float]:
        memory = Memory()
        parameters = launches.pack([Array("x", 4096)], memory.place)
        instructions = program(loads("LDG.E R4, [R2.64]", "LDG.E R5, [R2.64+0x200]", "IADD3 R6, R4, R5, RZ"))
        instructions[1] = replace(instructions[1], sets=0)
        instructions[2] = replace(instructions[2], sets=1, waits=(0,) if dependent else ())
        instructions[3] = replace(instructions[3], waits=(0, 1))
        counts = Run(Kernel(instructions), 32, (1, 1), parameters, memory, 500.0, 1200.0).blocks([(0, 0)])
        return counts.block_cycles, counts.trips

    together, dependent = cycles(False), cycles(True)
    assert (together[1], dependent[1]) == (1, 2)
    assert 1200 < together[0] < 1250
    assert 2400 < dependent[0] < 2450


def test_copies_to_shared_memory_are_waited_for_by_groups() -> None:
    """The first of two groups arrives, then the second; what was copied can be read."""

    def cycles(*lines: str) -> tuple[float, float]:
        memory = Memory()
        x, y = launches.data("x", np.arange(1024, dtype=np.uint32)), launches.data("y", np.zeros(32, np.uint32))
        code = program("\n".join(("S2R R0, SR_TID.X", "SHF.L.U32 R1, R0, 0x2, RZ", "LDC.64 R2, c[0x0][0x210]",
                                  "LDC.64 R4, c[0x0][0x218]", "IMAD.WIDE.U32 R2, R0, 0x4, R2",
                                  "IMAD.WIDE.U32 R4, R0, 0x4, R4", *lines, "EXIT")))  # fmt: skip
        parameters = launches.pack([x, y], memory.place)
        counts = Run(Kernel(code), 32, (1, 1), parameters, memory, 500.0, 1200.0).blocks([(0, 0)])
        if "LDS R6, [R1+0x400]" in lines:
            assert y.data is not None
            assert y.data.view(np.uint32).tolist() == list(range(128, 160))
        return counts.block_cycles, counts.trips

    first, second = "LDGSTS.E [R1], desc[UR4][R2.64]", "LDGSTS.E [R1+0x400], desc[UR4][R2.64+0x200]"
    between = ["MUFU.RCP R9, R9"] * 300
    groups = (first, "LDGDEPBAR", *between, second, "LDGDEPBAR")
    read = ("LDS R6, [R1+0x400]", "STG.E desc[UR4][R4.64], R6")
    assert 1200 < cycles(*groups, "DEPBAR.LE SB0, 0x1")[0] < 1250
    assert 1500 < cycles(*groups, "DEPBAR.LE SB0, 0x0", *read)[0] < 1600
    assert cycles(*groups, "DEPBAR.LE SB0, 0x2") == (cycles(*groups)[0] + 1, 0)
    assert cycles(*groups, "DEPBAR.LE SB0, 0x1", "DEPBAR.LE SB0, 0x0")[1] == 2


def test_barriers_hold_warps_and_some_warps_stand_for_all() -> None:
    text = """
        S2R R0, SR_TID.X
        SHF.L.U32 R1, R0, 0x2, RZ
        STS [R1], R0
        BAR.SYNC.DEFER_BLOCKING 0x0
        LOP3.LUT R1, R1, 0x80, RZ, 0x3c, !PT
        LDS R2, [R1]
        EXIT
    """
    assert execute(text, threads=64).issued["LDS"] == 2
    apart = Run(Kernel(program("FADD R0, R0, 1\nEXIT")), 128, (1, 1), b"", Memory(), 500.0, 1200.0, warps=(0,))
    counts = apart.blocks([(0, 0)])
    assert (counts.issued["FADD"], counts.warps) == (4, 4)
    with pytest.raises(RuntimeError, match="wait for each other"):
        Run(Kernel(program(text)), 64, (1, 1), b"", Memory(), 500.0, 1200.0, warps=(0,)).blocks([(0, 0)])


class Registers:
    """Has as much of a warp as arithmetic needs."""

    def __init__(self) -> None:
        self.regs, self.preds = np.zeros((320, 32), np.uint32), np.zeros((16, 32), bool)
        self.preds[7] = self.preds[15] = True


def result(text: str, **registers: int) -> int:
    """Return R0 after an instruction, with registers and predicates set: R1=5, P0=1."""
    warp = Registers()
    for name, value in registers.items():
        rows = warp.regs if name[0] == "R" else warp.preds
        rows[int(name[1:])] = value & 0xFFFFFFFF if name[0] == "R" else bool(value)
    with np.errstate(all="ignore"):
        compile_instruction(parse_instruction(text))(warp, np.ones(32, bool))
    return int(warp.regs[0][0])


@pytest.mark.parametrize(
    ("text", "registers", "expected"),
    [
        ("IADD3 R0, R1, -R2, RZ", {"R1": 3, "R2": 5}, -2),
        ("IADD3.X R0, R1, ~R2, RZ, P0, !PT", {"R1": 7, "R2": 2, "P0": 1}, 5),
        ("IMAD R0, R1, R2, R3", {"R1": -3, "R2": 4, "R3": 1}, -11),
        ("IMAD.HI.U32 R0, R1, R2, RZ", {"R1": 1 << 31, "R2": 6}, 3),
        ("LEA R0, R1, R2, 0x3", {"R1": 5, "R2": 2}, 42),
        ("LEA.HI R0, R1, R2, RZ, 0x4", {"R1": 0xF0000000, "R2": 1}, 16),
        ("LEA.HI.X.SX32 R0, R1, R2, 0x1, P0", {"R1": -1, "R2": 9, "P0": 1}, 9),
        ("SHF.R.S32.HI R0, RZ, 0x1f, R1", {"R1": -5}, -1),
        ("SHF.R.U64 R0, R1, 0x8, R2", {"R1": 0x1234, "R2": 0xAB}, 0xAB000012),
        ("SHF.L.U64.HI R0, R1, 0x4, R2", {"R1": 0xF0000000, "R2": 1}, 0x1F),
        ("PRMT R0, R1, 0x5410, R2", {"R1": 0x11112222, "R2": 0x33334444}, 0x44442222),
        ("LOP3.LUT R0, R1, R2, R3, 0xf8, !PT", {"R1": 1, "R2": 6, "R3": 2}, 3),
        ("SEL R0, R1, R2, !P0", {"R1": 1, "R2": 2, "P0": 1}, 2),
        ("VIADDMNMX R0, R1, 0x4, R2, PT", {"R1": -10, "R2": 3}, -6),
        ("POPC R0, R1", {"R1": 0xF0F}, 8),
        ("FLO.U32 R0, R1", {"R1": 0x80}, 7),
        ("FFMA R0, R1, 2, R2", {"R1": 0x3F800000, "R2": 0x40000000}, 0x40800000),
        ("FFMA.RM R0, R1, R1, 12582913", {"R1": 0x3FC00000}, 0x4B400003),
        ("F2FP.BF16.F32.PACK_AB R0, R1, R2", {"R1": 0x3F800000, "R2": 0x40008001}, 0x3F804001),
        ("F2F.BF16.F32 R0, R1", {"R1": 0x40008001}, 0x4001),
        ("F2F.F16.F32 R0, R1", {"R1": 0x3F800000}, 0x3C00),
        ("HFMA2.MMA R0, -RZ, RZ, 1.875, 0", {}, 0x3F800000),
    ],
)
def test_arithmetic(text: str, registers: dict[str, int], expected: int) -> None:
    assert result(text, **registers) == expected & 0xFFFFFFFF


def test_carries_and_comparisons_of_64_bits() -> None:
    warp, lanes = Registers(), np.ones(32, bool)
    warp.regs[1], warp.regs[2] = 0xFFFFFFFF, 1
    compile_instruction(parse_instruction("IADD3 R0, P0, R1, R2, RZ"))(warp, lanes)
    assert (warp.regs[0][0], warp.preds[0][0]) == (0, True)
    compile_instruction(parse_instruction("IADD3 R0, P1, RZ, -R3, RZ"))(warp, lanes)
    assert warp.preds[1][0]  # 0 - 0 does not borrow
    compile_instruction(parse_instruction("ISETP.GE.U32.AND P2, PT, R2, R1, PT"))(warp, lanes)
    compile_instruction(parse_instruction("ISETP.GE.AND.EX P2, PT, R2, RZ, PT, P2"))(warp, lanes)
    assert warp.preds[2][0]  # (1, 1) >= (0, all ones): the high words decide


def test_a_guard_that_is_false_leaves_uniform_registers_alone() -> None:
    for text in ("UMOV UR2, 0x7", "UIMAD.WIDE UR2, UR4, 0x3, UR2", "UISETP.EQ.AND UP0, UPT, UR4, UR4, UPT"):
        for lanes in (0, 3):
            warp, mask = Registers(), np.arange(32) < lanes
            compile_instruction(parse_instruction(text))(warp, mask)
            changed = warp.regs[UNIFORM + 2].any() or warp.preds[8].any()
            assert changed == (lanes > 0 and "WIDE" not in text)


def test_unknown_instructions_are_named() -> None:
    with pytest.raises(UnknownInstructionError, match="FROB"):
        compile_instruction(parse_instruction("FROB.X R0, R1"))


def test_bank_conflicts() -> None:
    lane = np.arange(32)
    assert bank_conflicts(lane * 4, 4) == 1
    assert bank_conflicts(lane * 128, 4) == 32
    assert bank_conflicts(lane * 0, 4) == 1
    assert bank_conflicts(lane * 16, 16) == 4


# --- the arithmetic of a GPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 32, 0, 8),  # 64 warps fit
        (256, 33, 0, 6),  # with 40 registers a thread 51 warps fit, so 6 blocks of 8
        (256, 128, 0, 2),
        (128, 16, 32 << 10, 6),  # each takes 33 KB of 228, with the system's
        (32, 16, 0, 32),
        (1024, 128, 0, 0),
    ],
)
def test_occupancy(threads: int, registers: int, shared: int, blocks: int) -> None:
    assert gpus.resident_blocks(threads, registers, shared) == blocks


GPU = gpus.Gpu("test", copy=1e12, flops=100e12, processors=100, clock=1e9, l2=2e12, dram_seconds=1e-6)


def test_littles_law() -> None:
    # 1 TB/s for 1 us is 1 MB under way, on 100 multiprocessors.
    assert gpus.bytes_needed(GPU) == pytest.approx(10_000)
    # A block loads 4 KB in 2000 cycles: 4 KB are under way for half of the time, and two blocks are there.
    assert gpus.bytes_in_flight(4096, 2000, 2, GPU) == pytest.approx(4096)


def test_terms_of_an_estimate() -> None:
    counts = Counts(blocks=2, warps=16, issued=Counter({"FFMA": 4000, "MUFU": 500, "LDG": 100}), wavefronts=400)
    counts.l2_bytes, counts.block_cycles = 20_000, 6000
    counts.loaded, counts.stored = Counter({"x": 16_000, "small": 64}), Counter({"y": 4_000})
    own = gpus.estimate(GPU, counts, 1000, 256, 64, 0, {"x": 10**8, "small": 32, "y": 10**8}, set())
    assert own.moved == pytest.approx(500 * 20_000 + 64)  # `small` is read once, however many blocks do
    assert own.terms["memory"] == pytest.approx(1e-5, rel=1e-4)
    assert own.terms["L2"] == pytest.approx(5e-6)
    assert own.terms["issue"] == pytest.approx(500 * 4600 / 4 / 1e11)
    assert own.terms["special"] == pytest.approx(500 * 1000 / 1e11)
    assert own.terms["load/store"] == pytest.approx(500 * 400 / 1e11)
    assert own.terms["latency"] == pytest.approx(1000 / 400 * 3000 / 1e9)  # 4 blocks are resident
    assert own.limit == "memory"
    assert max(own.terms.values()) < own.seconds < 1.2 * max(own.terms.values())


def test_structs_are_laid_out_as_in_cpp() -> None:
    memory = Memory()
    inner = [launches.i32(7), launches.i64(8)]
    packed = launches.pack([launches.i32(1), inner, launches.f32(0.5), None], memory.place)
    assert packed == struct.pack("<i4xi4xqf4xQ", 1, 7, 8, 0.5, 0)


def test_ragged_inputs_are_periods_of_4_5_bytes() -> None:
    assert sum(launches.period()) == launches.BYTES_A_PERIOD == 4.5 * len(launches.period())
    own = launches.layout()
    assert own.offsets[-1] == launches.BYTES
    assert (np.diff(own.offsets) > 0).all()
    assert own.decode_ids[0] == (0 if own.offsets[1] == 1 else -1)


def test_an_entry_that_no_longer_fits_says_what_to_edit() -> None:
    kernel = run.Compiled("copy_kernel<float>", "", 16, 0, 32, (8, 8))
    launch = launches.Launch("copy", "copy_kernel<float>", (1, 1), [Array("x", 4)], [(0, 0)])
    with pytest.raises(run.ModelError, match=r"parameters of \(8, 8\) bytes, its entry of \(8,\): edit its entry"):
        run.execute([kernel], launch)
    with pytest.raises(run.ModelError, match=r"blocks of 32 threads, its entry of 64: edit its entry"):
        run.execute([replace(kernel, parameters=(8,))], replace(launch, threads=64))
    with pytest.raises(run.ModelError, match=r"copy\.cu has 0 kernels 'other': edit its entry"):
        run.execute([kernel], replace(launch, kernel="other"))
    unknown = replace(kernel, code=LISTING.replace("S2R R0, SR_TID.X", "FROB R0"), parameters=(8,))
    with pytest.raises(run.ModelError, match="an instruction FROB: add it"):
        run.execute([unknown], launch)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_real_kernel_computes_what_it_should() -> None:
    """The sum that patch_unpool sends back, from the machine code that nvcc makes."""
    from cuda_model.cases import cases

    cuda_check.kernels_of(cuda_check.ROOT / "csrc" / "cuda" / "patch_unpool.cu", cuda_check.MODELED)
    case = next(c for c in cases() if c.op == "patch_unpool patch bwd")
    launch = case.launches[-1]
    arrays = {array.name: array for array in run.arrays_of(launch.arguments)}
    grad = np.random.default_rng(0).integers(-9, 9, (launches.BYTES, launches.WIDTH)).astype(np.float32)
    arrays["grad_out"].data = (grad.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
    arrays["grad_y"].data = np.zeros(arrays["grad_y"].size, np.uint8)
    run.execute(cuda_check.compiled("patch_unpool"), replace(launch, warps=None, sample=[(50, 0)]))
    found = arrays["grad_y"].data.view(np.uint16).reshape(-1, launches.WIDTH).astype(np.uint32) << 16
    written = np.flatnonzero(found.any(1))
    assert len(written) >= 1
    offsets = launches.layout().offsets
    for patch in written:
        expected = grad[offsets[patch] : offsets[patch + 1]].sum(0)
        assert (found[patch].view(np.float32) == expected).all()


# --- attention --------------------------------------------------------------------------------------------------------


def test_tiles_of_causal_documents_and_windows() -> None:
    # Two documents of 256 have 2 and 4 tiles of 128 x 64 each, of which 2 of the second block are full.
    assert attention.tiles(Documents((256, 256)), False, 128, 64) == ([2, 4, 2, 4], 4)
    # The queries behind a key attend to it, so there are as many tiles from the other side.
    assert attention.tiles(Documents((256, 256)), True, 128, 64) == ([4, 2, 4, 2], 4)
    counts, full = attention.tiles(Documents((1024,), 256), False, 128, 64)
    assert counts[-1] == 6  # it attends to 256 + 127 keys
    assert full == 2 * 6 + 2  # every block from the second on has 2 full tiles
    assert Documents((4, 3), 2).pairs == 1 + 2 + 2 + 2 + 1 + 2 + 2


ATTENTION = """
    MOV R0, 0x10
    loop: LDGSTS.E.BYPASS.128 [R75], desc[UR24][R46.64]
    HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR12], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    MUFU.EX2 R3, R3
    @P2 BRA <full>
    FSEL R3, R3, -INF, P3
    full: FFMA R3, R3, R3, R3
    IADD3 R0, R0, -0x1, RZ
    @P0 BRA <loop>
    exact: LDG.E.128 R4, desc[UR24][R46.64]
    HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR12], R24, gsb0
    @P1 BRA <exact>
    EXIT
"""


def attention_kernel() -> TritonKernel:
    return TritonKernel("fwd", program(ATTENTION), 200, 100 << 10, 8, 128, 128, 3)


def test_the_main_loop_is_the_one_with_asynchronous_loads() -> None:
    kernel = attention_kernel()
    (loop,) = attention.main_loops(kernel)
    assert loop.head == 1
    certain = unconditional(kernel.instructions, loop)
    assert [kernel.instructions[n].opcode for n in sorted(loop.own() - certain)] == ["FSEL"]
    body = attention.Body.of([kernel.instructions[n] for n in sorted(certain)])
    assert (body.flops, body.operand_bytes, body.waits) == (2 * 64 * 128 * 16, 2 * 16 * 128, 1)
    with pytest.raises(run.ModelError, match="no loop with tensor core instructions: edit main_loops"):
        attention.main_loops(replace(kernel, instructions=program("EXIT")))


def test_products_and_the_rest_overlap_in_part() -> None:
    kernel = attention_kernel()
    (loop,) = attention.main_loops(kernel)
    body = attention.Body.of([kernel.instructions[n] for n in sorted(unconditional(kernel.instructions, loop))])
    own = attention.iteration(kernel, body, 1, GPU)
    peak = 100e12 / 100 / 1e9  # is in flops a cycle and multiprocessor
    assert own["tensor"] == pytest.approx(2 * body.flops / peak)
    assert own["both"] == pytest.approx(own["tensor"] + 0.75 * own["other"])
    alone = attention.iteration(replace(kernel, warps=4), body, 1, GPU)
    assert alone["both"] == pytest.approx(alone["tensor"] + alone["other"])


# --- the table --------------------------------------------------------------------------------------------------------


def row(**changes: str) -> table.Written:
    own = {"op": "pool", "shape": "s", "dtype": "bfloat16", "gpu": "H100", "kernel": "all", "us": "100"}
    return own | {"instructions": "50", "compiler": "nvcc 13.0"} | changes


def test_the_table_sees_ten_percent_either_way() -> None:
    assert table.differences([row()], [row(us="110")]) == []
    assert table.differences([row()], [row(us="90", instructions="45")]) == []
    (slower,) = table.differences([row()], [row(us="111")])
    assert slower == "slower: pool, s, bfloat16, H100, all: 100 -> 111 us"
    (faster,) = table.differences([row()], [row(us="89", compiler="nvcc 13.1")])
    assert faster == "faster: pool, s, bfloat16, H100, all: 100 -> 89 us (nvcc 13.0 then, nvcc 13.1 now)"
    assert table.differences([row()], [row(instructions="60")])[0].startswith("more: ")
    assert table.differences([], [row()])[0].startswith("new: ")
    assert table.missing([row(), row(gpu="H200")], [row()], False) == ["gone: pool, s, bfloat16, H200, all"]
    assert table.missing([row(), row(op="sort")], [row()], False) == []
    assert table.missing([row(), row(op="sort")], [row()], True) == ["gone: sort, s, bfloat16, H100, all"]


def test_the_committed_table_is_complete() -> None:
    from cuda_model.cases import cases

    rows = table.read()
    named = {(case.op, case.shape) for case in cases()}
    attended = {r["op"] for r in rows if r["op"].startswith("block_causal_attention")}
    assert attended == {f"block_causal_attention {kind}" for kind in ("fwd", "bwd", "decode")}
    for gpu in ("H100", "H200"):
        whole = {(r["op"], r["shape"]) for r in rows if r["gpu"] == gpu and r["kernel"] == table.WHOLE}
        assert {pair for pair in whole if pair[0] not in attended} == named


def test_measurements_stand_beside_estimates() -> None:
    measured = [
        {"op": "pool fwd", "dtype": "bfloat16", "shape": "[8, 8192]", "median_ms": "0.05", "share_of_limit": "0.8"},
        {"op": "pool fwd+bwd", "dtype": "bfloat16", "shape": "[8, 8192]", "median_ms": "0.13", "share_of_limit": "0.7"},
    ]
    assert table.measured(measured, "pool fwd", "bfloat16", "8192") == (pytest.approx(50), 0.8)
    assert table.measured(measured, "pool bwd", "bfloat16", "8192") == (pytest.approx(80), None)
    assert table.measured(measured, "pool fwd", "float32", "8192") == (None, None)


def test_measurements_are_of_the_newest_file(tmp_path) -> None:
    header = "op,shape,dtype,implementation,median_ms,share_of_limit\n"
    (tmp_path / "2026-11-01-nvidia-h100-80gb.csv").write_text(header + "pool fwd,s,b,blt_kernels,2,0.1\n")
    (tmp_path / "2026-11-02-nvidia-h100-80gb.csv").write_text(
        header + "pool fwd,s,b,blt_kernels,1,0.2\npool fwd,s,b,limit: copy,1,1\n"
    )
    assert [r["median_ms"] for r in table.measurements(tmp_path, "H100")] == ["1"]
    assert table.measurements(tmp_path, "H200") == []
