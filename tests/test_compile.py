"""Every kernel compiles for real GPUs at BERT-base's shapes, without one: no spills, tensor cores used, no atomics.

The compiler runs in processes of their own (see offline.py). Triton keeps what it compiled, so a second run is faster.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import offline
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    "attention-128", "attention-512", "layer_norm", "bias_gelu-erf", "gelu_layer_norm", "embedding", "cross_entropy",
]  # fmt: skip
RUNS = {
    ("sm_90", "bfloat16"): [
        "attention-32", "attention-64", "attention-128", "attention-512", "attention-512-no-dropout", "layer_norm",
        "layer_norm-bare", "bias_gelu-erf", "bias_gelu-tanh", "gelu_layer_norm", "embedding", "cross_entropy",
        "cross_entropy-smoothed",
    ],
    ("sm_80", "bfloat16"): SHORT,
    ("sm_90", "float32"): SHORT,
    ("sm_100", "float32"): ["attention-512"],
}  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    """(target, dtype) -> case -> its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compiled(run):
        command = [sys.executable, offline.__file__, *run, *RUNS[run]]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(compiled, RUNS)))


@pytest.mark.parametrize(
    "target, dtype, case",
    [(*run, case) for run, names in RUNS.items() for case in names],
    ids=lambda value: value.replace("bfloat16", "bf16").replace("float32", "fp32"),
)
def test_kernels(reports, target, dtype, case):
    kernels = reports[target, dtype][case]
    assert isinstance(kernels, list) and kernels, kernels
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["spills"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= offline.TARGETS[target][1], f"too much shared memory: {kernel}"
        assert kernel["atomics"] == 0, f"atomics: the result depends on the order of programs: {kernel}"
        assert not kernel["narrow_offsets"], f"32-bit offsets overflow: {kernel}"
        # two scalars are read so; a tile that is has lost its vector loads, most often to a mask at an odd size
        assert kernel["two_bytes"] <= 2, f"loads or stores of two bytes: {kernel}"
        # a tile of 32 rows is less than the 64 that Hopper's instruction wants
        if kernel["dots"] and target == "sm_90" and dtype == "bfloat16" and case != "attention-32":
            assert kernel["hgmma"], f"products without Hopper's tensor cores: {kernel}"
        if dtype == "float32":
            assert kernel["tensor_cores"] == 0, f"products of fp32 in tf32, which nobody asked for: {kernel}"


def test_every_kernel_was_compiled(reports):
    compiled = {kernel["kernel"] for kernels in reports["sm_90", "bfloat16"].values() for kernel in kernels}
    for path in (ROOT / "kernels").glob("*.py"):
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert name in compiled, f"{path.name}: no case in offline.py launches {name}"


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
    assert len(offline.narrow_offsets(code, {"stride": 768}, (4 << 20, 1, 1))) == found
    assert offline.narrow_offsets(code, {"stride": 768}, (1000, 1, 1)) == []
