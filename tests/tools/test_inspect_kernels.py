"""The inspection of machine code: what it reads in it, what its gate reports, and the command.

Triton's interpreter is active in this process, so whatever compiles runs in another.
"""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import inspect_kernels
from kernel_inspection import baseline, gate, machine_code, pool, variants
from kernel_inspection.compiled import Report, Resources
from kernel_inspection.machine_code import Code
from kernel_inspection.machine_code import Path as CodePath
from kernel_inspection.variants import Variant
from scaleclip_kernels.tuning import ARCHITECTURES, KERNELS, OTHER, Key, Launch, table

TOOL = Path(inspect_kernels.__file__)
LAUNCH = Launch(128, 128, 64, num_warps=4, num_stages=3, tma=True)
CHIP_PIPES = {"issue": 2000.0, "fp32": 600.0, "special": 1000.0}


def sass(text: str) -> str:
    """As cuobjdump prints instructions: each with its address; labels keep a line of their own."""
    lines, address = [], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            lines.append(line)
        else:
            lines.append(f"        /*{address:04x}*/                   {line} ;                /* 0x0000000000007918 */")
            address += 16
    return "\n".join(lines)


def nvidia(text: str) -> Code:
    return machine_code.analyse(machine_code.read_nvidia(sass(text)))


def amd(text: str) -> Code:
    lines = filter(None, map(str.strip, text.splitlines()))
    listing = "\n".join(line if line.endswith(":") else f"\t{line}" for line in lines)
    return machine_code.analyse(machine_code.read_amd(listing))


def test_main_loop_and_ordinary_path() -> None:
    code = nvidia("""
        S2R R0, SR_TID.X
        .L_x_0:
        LDS.128 R4, [R0]
        LDGSTS.E.128 [R2], [R8.64]
        HMMA.16816.F32.BF16 R12, R4, R8, R12
        @P0 BRA `(.L_x_0)
        FMUL R12, R12, R1
        @P1 BRA `(.L_x_1)
        FSEL R12, R12, -INF , P2
        FSEL R13, R13, -INF , P2
        .L_x_1:
        MUFU.EX2 R12, R12
        @!P3 SHFL.BFLY PT, R3, R12, 0x1, 0x1f
        STG.E [R2.64], R12
        EXIT
        .L_x_2:
        BRA `(.L_x_2)
        NOP
    """)
    assert code.main_loop.total == 4
    assert [code.main_loop.pipes.get(pipe, 0) for pipe in ("matrix", "shared", "global")] == [1, 1, 1]
    # the block of FSEL is gone round; S2R, FMUL, BRA, MUFU, SHFL, STG, EXIT
    assert code.ordinary.total == 7
    assert [code.ordinary.pipes.get(pipe, 0) for pipe in ("alu", "special", "shuffle", "global", "fp32")] == [0, 1, 1, 1, 1]


def test_the_cheaper_side_counts_its_pipes_and_not_its_length() -> None:
    code = nvidia("""
        .L_x_0:
        HMMA.16816.F32 R12, R4, R8, R12
        @P0 BRA `(.L_x_0)
        @P1 BRA `(.L_x_1)
        MUFU.EX2 R12, R12
        BRA `(.L_x_2)
        .L_x_1:
        FADD R1, R1, R2
        FADD R1, R1, R2
        FADD R1, R1, R2
        .L_x_2:
        EXIT
    """)
    assert "special" not in code.ordinary.pipes
    assert code.ordinary.pipes["fp32"] == 3


def test_main_loop_is_the_first_and_innermost_with_products() -> None:
    code = nvidia("""
        .L_x_0:
        IMAD.MOV.U32 R2, RZ, RZ, R3
        @P0 BRA `(.L_x_0)
        .L_x_1:
        MOV R9, R8
        .L_x_2:
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24
        @P1 BRA `(.L_x_2)
        @P2 BRA `(.L_x_1)
        .L_x_3:
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24
        FADD R1, R1, R2
        @P1 BRA `(.L_x_3)
        EXIT
    """)
    assert (code.main_loop.total, code.main_loop.pipes["matrix"]) == (2, 1)


def test_exact_products_are_found_among_loops() -> None:
    code = nvidia("""
        .L_x_0:
        IMAD.MOV.U32 R2, RZ, RZ, R3
        @P0 BRA `(.L_x_0)
        .L_x_1:
        LDS R4, [R0]
        FFMA R1, R4, R5, R1
        FFMA R2, R4, R6, R2
        @P1 BRA `(.L_x_1)
        EXIT
    """)
    assert (code.main_loop.total, code.main_loop.pipes["fp32"]) == (4, 2)


def test_long_loop_is_left_by_a_call() -> None:
    code = nvidia("""
        .L_x_0:
        FFMA R1, R4, R5, R1
        @P4 CALL.REL.NOINC `(.L_x_1)
        BRA `(.L_x_0)
        .L_x_1:
        MUFU.EX2 R1, R1
        CALL.REL.NOINC `(.L_x_2)
        STG.E [R2.64], R1
        EXIT
        .L_x_2:
        MUFU.RCP R3, R1
        RET.REL.NODEC R4 0x0
    """)
    assert code.main_loop.total == 3
    # MUFU, CALL, STG, EXIT: the subroutine's end leads nowhere
    assert code.ordinary.total == 4


def test_pipes() -> None:
    code = nvidia("""
        FADD2 R2, R2.F32x2.HI_LO, R4.F32x2.HI_LO
        FFMA2 R2, R2.F32x2.HI_LO, R4.F32x2.HI_LO, R6.F32x2.HI_LO
        FMUL R1, R1, R2
        IMAD R3, R3, R4, RZ
        FMNMX3 R1, R1, R2, R3, !PT
        F2FP.BF16.F32.PACK_AB R1, R1, R2
        @!UP0 LOP3.LUT R1, R1, R2, RZ, 0xc0, !PT
        STS.64 [R0], R2
        UTMASTG.2D [UR8], [UR4]
        BAR.SYNC.DEFER_BLOCKING 0x0
        .L_x_0:
        UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], !UPT
        @P0 BRA `(.L_x_0)
        EXIT
    """)
    assert code.ordinary.pipes == {"fp32": 6, "alu": 3, "shared": 1, "global": 1, "other": 2}
    assert code.ordinary.total == 11


def test_spills_are_counted() -> None:
    listing = machine_code.read_nvidia(sass("STL [R1+0x4], R2 \n LDS R2, [R0] \n @P0 LDL.LU R2, [R1+0x4] \n EXIT"))
    assert machine_code.spills(listing) == 2
    assembly = "\tscratch_store_dword off, v1, s32\n\tv_add_f32_e32 v1, v1, v2 ; comment\n\ts_endpgm\n"
    assert machine_code.spills(machine_code.read_amd(assembly)) == 1


@pytest.mark.parametrize("text", ["FADD R1, R1, R2 \n EXIT", ".L_x_0: \n FADD R1, R1, R2 \n @P0 BRA `(.L_x_0) \n EXIT"])
def test_kernel_without_products_has_no_main_loop(text: str) -> None:
    with pytest.raises(ValueError, match="no loop with products"):
        nvidia(text)


def test_masked_blocks_on_amd() -> None:
    code = amd("""
        s_load_dwordx2 s[0:1], s[4:5], 0x0
        .LBB0_1:
        ds_read_b64 v[2:3], v0
        v_mfma_f32_32x32x8_bf16_1k v[4:19], v[2:3], v[2:3], v[4:19]
        s_cbranch_scc1 .LBB0_1
        s_and_saveexec_b64 s[2:3], vcc
        s_cbranch_execz .LBB0_2
        v_cndmask_b32_e32 v4, v5, v4, vcc
        v_cndmask_b32_e32 v4, v5, v4, vcc
        .LBB0_2:
        s_or_b64 exec, exec, s[2:3]
        s_and_saveexec_b64 s[2:3], vcc
        s_cbranch_execz .LBB0_3
        v_exp_f32_e32 v4, v4
        global_store_dword v[2:3], v4, off
        .LBB0_3:
        s_or_b64 exec, exec, s[2:3]
        s_and_saveexec_b64 s[2:3], vcc
        s_cbranch_execnz .LBB0_5
        .LBB0_4:
        s_or_b64 exec, exec, s[2:3]
        s_endpgm
        .LBB0_5:
        v_exp_f32_e32 v5, v5
        global_store_dword v[2:3], v5, off
        s_branch .LBB0_4
    """)
    assert code.main_loop.total == 3
    # the diagonal's block is gone round, those of the stores are not
    assert code.ordinary.pipes["special"] == 2
    assert code.ordinary.pipes["global"] == 2
    assert "fp32" not in code.ordinary.pipes


@pytest.mark.parametrize(
    "mask", ["s_or_saveexec_b64 s[2:3], s[2:3] \n s_xor_b64 exec, exec, s[2:3]", "s_andn2_saveexec_b64 s[2:3], s[2:3]"]
)
def test_one_of_if_and_else_is_run_on_amd(mask: str) -> None:
    code = amd(f"""
        .LBB0_1:
        v_mfma_f32_32x32x8_bf16_1k v[4:19], v[2:3], v[2:3], v[4:19]
        s_cbranch_scc1 .LBB0_1
        s_and_saveexec_b64 s[2:3], vcc
        s_xor_b64 s[2:3], exec, s[2:3]
        s_cbranch_execz .LBB0_2
        v_exp_f32_e32 v4, v4
        v_exp_f32_e32 v5, v5
        v_exp_f32_e32 v6, v6
        .LBB0_2:
        {mask}
        s_cbranch_execz .LBB0_3
        v_exp_f32_e32 v4, v4
        v_exp_f32_e32 v5, v5
        .LBB0_3:
        s_or_b64 exec, exec, s[2:3]
        s_endpgm
    """)
    assert code.ordinary.pipes["special"] == 2


def a_variant(**changes: object) -> Variant:
    return replace(Variant("sm90", "softmax_sums", "bf16", "16 bits", "plain", LAUNCH), **changes)  # type: ignore[arg-type]


def a_report(variant: Variant | None = None, *, ratio: float = 0.5, **changes: object) -> Report:
    """Of a kernel without a fault."""
    code = Code(CodePath(99, {"matrix": 8, "global": 2}), CodePath(2000, {"special": 130, "alu": 400}))
    report = Report(
        registers=250,
        stack_bytes=0,
        spills=0,
        shared_bytes=96 << 10,
        matrix_instructions={"m64n128k16": 16},
        variant=variant or a_variant(),
        blocks=2,
        code=code,
        matrix_cycles=4000.0,
        loop_cycles=800.0,
        pipe_cycles={**CHIP_PIPES, "issue": 4000.0 * ratio},
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def faults(report: Report | pool.Failure, recorded: Report | None, variant: Variant | None = None) -> list[str]:
    row = None if recorded is None else baseline.rows([recorded])[0]
    return gate.variant_faults(variant or (report.variant if isinstance(report, Report) else a_variant()), report, row)


def test_gate_passes_what_has_no_fault() -> None:
    assert faults(a_report(), a_report()) == []
    assert faults(a_report(ratio=0.509), a_report(ratio=0.5)) == []
    assert faults(a_report(ratio=0.4), a_report(ratio=0.5)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stack_bytes": 16}, "spills: 16 bytes of stack a thread, 0 instructions"),
        ({"spills": 3}, "spills: 0 bytes of stack a thread, 3 instructions"),
        ({"shared_bytes": 228 << 10}, "233472 bytes of shared memory do not fit sm90's 232448"),
        ({"matrix_instructions": {}}, r"matrix instructions are none, not m64n\d+k16"),
        ({"matrix_instructions": {"m16n8k16": 64}}, r"matrix instructions are m16n8k16, not m64n\d+k16"),
        ({"ratio": 0.56}, "epilogue ratio 0.560 (issue) is above 0.55"),
        ({"code": Code(CodePath(9, {}), CodePath(9, {"special": 2}))}, "has 2 exponentials for 128 logits a thread"),
    ],
)
def test_gate_reports_each_fault(changes: dict[str, object], expected: str) -> None:
    (fault,) = faults(a_report(**changes), a_report(ratio=0.6))  # type: ignore[arg-type]
    assert expected in fault


@pytest.mark.parametrize(("more_stack", "more_spills", "passes"), [(0, 0, True), (-8, -3, True), (8, 0, False), (0, 1, False)])
def test_known_spills_may_not_grow(more_stack: int, more_spills: int, passes: bool) -> None:
    stack_bytes, spills = gate.KNOWN_SPILLS["sm90 softmax_sums fp16 plain"]
    report = a_report(a_variant(dtype="fp16"), stack_bytes=stack_bytes + more_stack, spills=spills + more_spills)
    assert (faults(report, report) == []) == passes
    assert len(faults(replace(report, variant=a_variant()), a_report())) == 1


def test_known_spills_are_those_of_the_record() -> None:
    with (Path(inspect_kernels.__file__).parent / "results" / "kernels_aot.csv").open(newline="") as file:
        recorded = {
            f"{row['architecture']} {row['kernel']} {row['dtype']} {row['options']}": (
                int(row["stack_bytes"]),
                int(row["spills"]),
            )
            for row in csv.DictReader(file)
            if row["spills"] != "0" or row["stack_bytes"] != "0"
        }
    assert recorded == gate.KNOWN_SPILLS


def test_gate_reports_growth_and_what_the_baseline_lacks() -> None:
    (fault,) = faults(a_report(ratio=0.52), a_report(ratio=0.5))
    assert "epilogue ratio grew from 0.500" in fault
    assert "to 0.520" in fault
    (fault,) = faults(a_report(), None)
    assert fault == f"the baseline has no row: refresh with {gate.REFRESH}"
    other = a_variant(launch=replace(LAUNCH, num_stages=4))
    (fault,) = faults(a_report(), a_report(other))
    assert fault == f"the baseline has another launch: refresh with {gate.REFRESH}"


def test_gate_reports_what_does_not_compile() -> None:
    assert faults(pool.Failure("no such instruction"), a_report()) == ["does not compile: no such instruction"]
    assert gate.resource_faults("sm80", pool.Failure("no such instruction")) == ["does not compile: no such instruction"]
    resources = Resources(registers=32, stack_bytes=0, spills=0, shared_bytes=0, matrix_instructions={})
    assert gate.resource_faults("gfx942", resources) == []
    assert "spills" in gate.resource_faults("gfx942", replace(resources, stack_bytes=8))[0]


@pytest.mark.parametrize(
    ("architecture", "products", "right", "wrong"),
    [
        ("sm80", "16 bits", "m16n8k16", "m16n8k8"),
        ("sm80", "tf32x3", "m16n8k8", "m16n8k4"),
        ("sm90", "tf32x3", "m64n64k8", "m16n8k8"),
        ("sm100", "16 bits", "tcgen05.mma", "m16n8k16"),
        ("sm100", "tf32x3", "tcgen05.mma", "m64n64k8"),
        ("gfx942", "16 bits", "32x32x8", None),
        ("gfx942", "ieee", "32x32x2", None),
        ("sm90", "ieee", None, "m64n64k8"),
    ],
)
def test_gate_knows_the_matrix_instructions(architecture: str, products: str, right: str | None, wrong: str | None) -> None:
    dtype = "bf16" if products == "16 bits" else "fp32"
    variant = a_variant(architecture=architecture, products=products, dtype=dtype, kernel="sigmoid")
    small = a_report(variant, shared_bytes=1024)
    good = replace(small, matrix_instructions={} if right is None else {right: 8})
    assert faults(good, good) == []
    bad = replace(small, matrix_instructions={} if wrong is None else {wrong: 8})
    (fault,) = faults(bad, good)
    assert "matrix instructions" in fault


def test_variants_are_what_runs_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key("sm80", "softmax_sums", "tf32x3", positives=False)
    without = {known: launch for known, launch in table().items() if known != key}
    monkeypatch.setattr(variants, "table", lambda: without)
    (found,) = (variant for variant in variants.variants("sm80") if variant.key == key and variant.options == "plain")
    assert found.is_fallback
    assert found.launch == without[key._replace(architecture=OTHER)]
    for architecture in ARCHITECTURES:
        listed = list(variants.variants(architecture))
        assert len(set(listed)) == len(listed)
        assert {variant.kernel for variant in listed} == set(KERNELS)
        assert any(variant.products == "tf32x3" for variant in listed) == architecture.startswith("sm")


def test_baseline_keeps_what_was_not_inspected(tmp_path: Path) -> None:
    path = tmp_path / "aot.csv"
    first, second = a_report(ratio=0.5), a_report(a_variant(kernel="sigmoid"), ratio=0.7)
    stale = a_report(a_variant(options="one way"))
    baseline.write(path, baseline.rows([second, first, stale]), [])
    baseline.write(path, baseline.rows([a_report(ratio=0.4)]), [("sm90", "softmax_sums")])
    rows = baseline.read(path)
    assert [(key.kernel, key.options) for key in rows] == [("softmax_sums", "plain"), ("sigmoid", "plain")]
    assert [row.numbers.epilogue_ratio for row in rows.values()] == [0.4, 0.7]
    assert list(rows.values()) == baseline.rows([a_report(ratio=0.4), second])
    path.write_text("architecture,kernel\nsm90,sigmoid\n")
    with pytest.raises(ValueError, match="not a record of inspect_kernels"):
        baseline.read(path)


def _halve(number: int) -> int:
    if number == 5:
        os._exit(3)
    if number % 2:
        os.write(2, b"error: invalid instruction\n   cvt.odd s4;\n")
        raise RuntimeError("no half")
    return number // 2


def test_pool_survives_what_a_compiler_does() -> None:
    done: list[None] = []
    found = pool.work_on(_halve, [2, 3, 5, 8], 1, lambda: done.append(None))
    ended = pool.Failure("the compiler ended its process")
    assert found == [1, pool.Failure("error: invalid instruction cvt.odd s4;"), ended, 4]
    assert len(done) == 4


def test_reason_is_the_first_cause() -> None:
    error = RuntimeError("at 38:16: somewhere")
    error.__cause__ = AssertionError("input_precision must be one of ('ieee',)")
    assert pool.reason(error, "") == "input_precision must be one of ('ieee',)"
    assert pool.reason(ValueError(), "") == "ValueError"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--architecture", "sm90,sm75"], "'sm75' is not one of sm80, sm90, sm100, gfx942"),
        (["--kernel", "softmax"], "'softmax' is not one of softmax_sums, softmax_gradients, sigmoid, fold_sums"),
        (["--jobs", "0"], "'0' is not a whole number above 0"),
        (["--csv", "here.txt"], "'here.txt' is not a path that ends in .csv"),
        (["--peer", "liger"], "invalid choice: 'liger'"),
        (["--peer", "inf_cl", "--check"], "leave out --check and --csv"),
        (["--markdown", "--csv", "here.csv"], "leave out --check and --csv"),
        (
            ["--check", "--baseline", "nowhere.csv"],
            "there is no nowhere.csv: write it with python tools/inspect_kernels.py --csv nowhere.csv",
        ),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        inspect_kernels.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        inspect_kernels.main(["--help"])
    assert exit_.value.code == 0
    assert "more than 2 % above" in " ".join(capsys.readouterr().out.split())


def test_missing_peer_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inspect_kernels.peer_inf_cl, "is_installed", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        inspect_kernels.main(["--peer", "inf_cl"])
    assert exit_.value.code == 2
    assert "pip install inf-cl" in capsys.readouterr().err


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_gate_of_one_kernel(tmp_path: Path) -> None:
    """Compiled here and now, compared with what was recorded."""
    path, dump = tmp_path / "found.csv", tmp_path / "dump"
    arguments = ["--architecture", "sm90", "--kernel", "softmax_gradients", "--jobs", "2"]
    run = run_tool(*arguments, "--check", "--csv", str(path), "--dump", str(dump))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "gate: passed" in run.stdout
    assert "m64n" in run.stdout
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kernel"] for row in rows} == {"softmax_gradients"}
    assert all(row["triton"] and row["commit"] and row["date"] for row in rows)
    assert all(row["spills"] == "0" for row in rows)
    assert (dump / "sm90-softmax_gradients-bf16-plain.ptx").exists()


@pytest.mark.slow
def test_gate_of_every_kernel() -> None:
    run = run_tool("--check", "--jobs", "2")
    assert run.returncode == 0, "\n".join(line for line in run.stdout.splitlines() if line.startswith("FAULT")) + run.stderr


@pytest.mark.slow
def test_gate_fails_where_the_baseline_is_better(tmp_path: Path) -> None:
    path = tmp_path / "found.csv"
    only = ["--architecture", "gfx942", "--kernel", "sigmoid", "--jobs", "2"]
    assert run_tool(*only, "--csv", str(path)).returncode == 0
    rows = list(baseline.read(path).values())
    rows[0] = replace(rows[0], numbers=replace(rows[0].numbers, epilogue_ratio=0.01))
    rows[1] = replace(rows[1], launch=replace(rows[1].launch, num_stages=9))
    baseline.write(path, rows[:-1], [("gfx942", "sigmoid")])
    run = run_tool(*only, "--check", "--baseline", str(path))
    assert run.returncode == 1
    reported = [line for line in run.stdout.splitlines() if line.startswith("FAULT")]
    assert len(reported) == 3
    assert "grew from 0.010" in reported[0]
    assert "another launch" in reported[1]
    assert "no row" in reported[2]
