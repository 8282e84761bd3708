"""Every kernel compiles for real GPUs, without one: no spills, tensor cores used, no atomics, offsets in 64 bits.

`fastbert doctor --compile` does it, in processes of its own. Triton keeps what it compiled: a second run is faster.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert import ops, reference
from fastbert.proof import machine_code
from fastbert.proof.op_cases import OPS

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

# compiled for every change; `fastbert doctor --compile` alone covers more
MAIN = ["attention", "disentangled_attention", "layer_norm", "gelu_layer_norm", "embedding", "masked_cross_entropy"]
RUNS = {
    "sm_90-bf16": "--arch sm_90 --dtype bf16 --model bert-base deberta-base mpnet-base",
    "sm_80-bf16": f"--arch sm_80 --dtype bf16 --model bert-base deberta-base --op {' '.join(MAIN)}",
    "sm_90-fp32": f"--arch sm_90 --dtype fp32 --model bert-base deberta-base --op {' '.join(MAIN)}",
    "others-fp32": "--arch sm_80 sm_100 --dtype fp32 --model bert-base --op attention",
}


def doctor(folder, arguments):
    """The rows of a doctor's report, none of which has a problem."""
    command = [sys.executable, "-m", "fastbert", "doctor", "--compile", *arguments.split()]
    done = subprocess.run(
        [*command, "--json", folder / "report.json"], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    # the report's own words, or what was raised
    assert done.returncode == 0, done.stderr + "problem: " + done.stdout.partition("problem: ")[2]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["command"].startswith("fastbert doctor --compile --arch=sm_") and report["date"]
    return report["kernels"]


@pytest.mark.parametrize("run", RUNS)
def test_kernels(run, tmp_path):
    rows = doctor(tmp_path, RUNS[run])
    assert rows
    for row in rows:
        assert row["problems"] == [] and row["registers"] > 0, row
        assert row["shared"] <= machine_code.ARCHITECTURES[row["arch"]].program_shared, row
        assert row["widths"].get("2", 0) <= 4, f"loads or stores of two bytes: {row}"
        if row["dtype"] == "fp32":
            assert row["tensor"] == {}, f"products of fp32 in tf32, which nobody asked for: {row}"
        elif row["dots"]:
            large = any(dot[0] >= 64 for dot in row["dots"])
            assert row["tensor"].get("HGMMA" if large and row["arch"] == "sm_90" else "HMMA"), row
    if run == "sm_90-bf16":
        compiled = {row["kernel"] for row in rows}
        for path in (ROOT / "kernels").glob("*.py"):
            for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
                assert name in compiled, f"{path.name}: no case in fastbert/proof/op_cases.py launches {name}"


def test_no_candidate_is_serialised(tmp_path):
    """What autotuning would try of the ops that multiply in their own kernels. It compiles without a problem, too."""
    arguments = "--arch sm_90 --dtype bf16 --model bert-base deberta-base --op attention disentangled_attention"
    rows = doctor(tmp_path, f"{arguments} --candidates")
    for op in ("attention", "disentangled_attention"):
        assert sum(row["is_candidate"] for row in rows if row["op"] == op) > 5
    assert not any(row["problems"] for row in rows)


def test_every_op_is_compiled():
    public = {name for name in vars(ops) if not name.startswith("_") and hasattr(reference, name)}
    # products of matrices are the device's own, and the mask of `dropout` is made of plain operations
    assert public - {"linear", "linears", "linear_gelu", "dropout", "torch"} == set(OPS)


@pytest.fixture(scope="module")
def faults():
    """What the report says of kernels with a known fault each."""
    command = [sys.executable, ROOT / "tests" / "bad_kernels.py", "sm_90"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PROBLEMS = {
    "spilling": "registers spill",
    "atomic": "1 atomics",
    "overflowing": "a 32-bit offset overflows",
    "tf32": "rounded to tf32",
}


def test_faults_are_found(faults):
    for name, problem in PROBLEMS.items():
        (found,) = faults[name]["problems"]
        assert problem in found
    assert {name for name in faults if faults[name]["problems"]} == {*PROBLEMS, "serialised"}


def test_serialised_products_are_found(faults):
    """By what ptxas says, and by the waits in the machine code; neither in the same kernel without the fault."""
    warning, waits = faults["serialised"]["problems"]
    assert "C7515" in warning and "serialized" in warning
    assert waits == "products are serialised: 12 waits for them, 2 of them in Triton's code"
    assert faults["serialised"]["tensor"] == faults["awaited"]["tensor"] == {"HGMMA": 12}
    assert faults["awaited"]["warnings"] == [] and faults["awaited"]["waits"] == [3, 3]


def test_what_is_no_fault_is_remarked(faults):
    assert {name for name in faults if faults[name]["remarks"]} == {"narrow", "small"}
    assert faults["narrow"]["widths"] == {"2": 128} and faults["narrow"]["wide_share"] == 0
    assert "two bytes" in faults["narrow"]["remarks"][0] and "too few rows" in faults["small"]["remarks"][0]


def test_the_loop_is_counted(faults):
    """y = x xᵀ, then exp2(y) * y + 1, on 4 warps: a thread has 32 of the 64 x 64 elements."""
    half, fp32 = faults["half"], faults["fp32"]
    assert half["dots"] == [[64, 64, 64, "bf16", "HGMMA"]] and half["tensor"] == {"HGMMA": 4}
    assert not half["loop"]["whole"] and half["loop"]["tensor"] == 4
    assert half["loop"]["mufu"] == 32 and half["loop"]["fp32"] == 32
    # 64 * 64 * 64 products, 2048 in a cycle
    assert half["cycles"]["tensor"] == 128 and half["cycles"]["mufu"] == 8 * 32
    assert sum(half["loop"][kind] for kind in machine_code.KINDS) == half["loop"]["slots"]
    # each thread multiplies 64 times for each of its elements
    assert fp32["tensor"] == {} and fp32["loop"]["fp32"] == 32 * 64 + 32
    assert faults["good"]["loop"]["whole"]


@pytest.mark.parametrize(
    "arch, registers, warps, shared, programs, limit",
    [
        ("sm_90", 128, 8, 0, 2, "registers"),
        ("sm_90", 129, 8, 0, 1, "registers"),
        ("sm_90", 168, 4, 0, 3, "registers"),
        ("sm_90", 32, 4, 0, 16, "warps"),
        ("sm_90", 16, 1, 0, 32, "programs"),
        # 1 KiB of each program's is taken: 75 KiB thrice is 228 and fits, a little more does not
        ("sm_90", 32, 4, 75 << 10, 3, "shared"),
        ("sm_90", 32, 4, (75 << 10) + 1, 2, "shared"),
        ("sm_80", 32, 4, 75 << 10, 2, "shared"),
        ("sm_89", 32, 8, 0, 6, "warps"),
        ("gfx942", 128, 4, 0, 4, "registers"),
        ("gfx942", 64, 4, 0, 8, "warps"),
        ("gfx942", 64, 4, 20 << 10, 3, "shared"),
    ],
)
def test_occupancy(arch, registers, warps, shared, programs, limit):
    assert machine_code.occupancy(arch, registers, warps, shared) == (programs, limit)


@pytest.mark.parametrize("widened, found", [("before", 0), ("after", 1), ("never", 1)])
def test_overflowing_offsets_are_found(widened, found):
    """row * stride in 64 bits; in 32 bits and widened too late; in 32 bits."""
    product = {
        "before": "%wide = arith.extsi %row : i32 to i64\n%by = arith.extsi %stride : i32 to i64\n"
        "%offset = arith.muli %wide, %by : i64",
        "after": "%narrow = arith.muli %row, %stride : i32\n%offset = arith.extsi %narrow : i32 to i64",
        "never": "%offset = arith.muli %row, %stride : i32",
    }[widened]
    code = f"%row = tt.get_program_id x : i32\n{product}\n%where = tt.addptr %x_ptr, %offset : !tt.ptr<bf16>, i64"
    assert len(machine_code.narrow_offsets(code, {"stride": 768}, (4 << 20, 1, 1))) == found
    assert machine_code.narrow_offsets(code, {"stride": 768}, (1000, 1, 1)) == []


def test_rows_read_from_memory_may_be_added_but_not_multiplied():
    """A wide index that is reshaped is no 32-bit one, though its axis is."""
    load = "%start = tt.load %p : !tt.ptr<i32>\n%length = tt.load %p : !tt.ptr<i32>\n"
    added = load + "%row = arith.addi %start, %length : i32\n"
    where = "%where = tt.addptr %x_ptr, %{} : !tt.ptr<bf16>, i32"
    assert machine_code.narrow_offsets(added + where.format("row"), {}, (1, 1, 1)) == []
    multiplied = added + "%offset = arith.muli %row, %stride : i32\n" + where.format("offset")
    assert len(machine_code.narrow_offsets(multiplied, {"stride": 8}, (1, 1, 1))) == 1
    wide = (
        "%w = arith.extsi %row : i32 to i64\n%s = arith.extsi %stride : i32 to i64\n%o = arith.muli %w, %s : i64\n"
        "%e = tt.expand_dims %o {axis = 1 : i32} : tensor<16xi64> -> tensor<16x1xi64>\n" + where.format("e")
    )
    assert machine_code.narrow_offsets(added + wide, {"stride": 1 << 20}, (1, 1, 1)) == []
