"""Compile every kernel for GPUs that are not here, as the launchers launch it, and read what the compiler made of it.

    python tests/offline.py sm_90 bfloat16 [case ...]

prints one JSON object: of every case its kernels, each with registers, stack and so on, or else the error it ended in.

A Triton driver without a device stands in for the real one. It records each launch instead of running it, so everything
above it is real: block sizes, specialisation, shared memory limits, the disk cache. Tensors are on the "meta" device:
they have shapes, strides and alignment but no memory, and matrix products cost nothing.

This must be a process of its own: Triton decides between compiler and interpreter when it is imported.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent

# shared memory that one program may have, bytes
TARGETS = {"sm_80": (80, 166912), "sm_90": (90, 232448), "sm_100": (100, 232448)}

# BERT-base: hidden size, feed-forward size, heads, head size, vocabulary. T is large enough that T * D passes 2^31
D, F, H, K, V, T, B = 768, 3072, 12, 64, 30522, 4 << 20, 1 << 15


def cases(dtype):
    """name -> function that calls launchers, on tensors of `dtype`, with dropout on."""
    from fastbert.kernels.attention import attention_bwd, attention_fwd
    from fastbert.kernels.bias_gelu import bias_gelu_bwd, bias_gelu_fwd
    from fastbert.kernels.cross_entropy import masked_cross_entropy_fwd
    from fastbert.kernels.embedding import embedding_bwd, embedding_fwd
    from fastbert.kernels.gelu_layer_norm import gelu_layer_norm_bwd, gelu_layer_norm_fwd
    from fastbert.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd

    def full(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    seed, ids = full(1, dtype=torch.int64), full(T, dtype=torch.int64)
    rows, weight, statistics = full(T, D), full(D), full(T, dtype=torch.float32)

    def layer_norm(residual, dropout_p):
        layer_norm_fwd(rows, weight, weight, residual, dropout_p, seed, 3, 1e-12)
        layer_norm_bwd(rows, rows, weight, weight, residual, statistics, statistics, dropout_p, seed, 3)

    def bias_gelu(approximate):
        bias_gelu_fwd(full(T, F), full(F), approximate)
        bias_gelu_bwd(full(T, F), full(T, F), full(F), approximate)

    def gelu_layer_norm(approximate):
        gelu_layer_norm_fwd(rows, weight, weight, weight, approximate, 1e-12)
        gelu_layer_norm_bwd(rows, rows, weight, weight, weight, statistics, statistics, approximate)

    def attention(length, dropout_p):
        qkv, cu_seqlens = full(T, 3, H, K), full(B + 1, dtype=torch.int32)
        shared = (cu_seqlens, cu_seqlens, length, length, K**-0.5, dropout_p, seed, 3)
        out, lse = attention_fwd(qkv, None, None, *shared)
        attention_bwd(out, qkv, None, None, out, lse, *shared)

    def embedding(dropout_p):
        tables = full(V, D), full(512, D), full(2, D)
        embedding_fwd(ids, ids, ids, *tables, weight, weight, 1e-12, dropout_p, seed, 3)
        embedding_bwd(rows, ids, ids, ids, *tables, weight, weight, statistics, statistics, 0, dropout_p, seed, 3)

    def cross_entropy(label_smoothing):
        hidden, wants = full(9000, D), [True, True, True, False]
        options = -100, label_smoothing, 0.0, False, wants
        masked_cross_entropy_fwd(hidden, full(V, D), full(V), ids[:9000], None, None, *options)

    return {
        "attention-32": lambda: attention(32, 0.1),
        "attention-64": lambda: attention(64, 0.1),
        "attention-128": lambda: attention(128, 0.1),
        "attention-512": lambda: attention(512, 0.1),
        "attention-512-no-dropout": lambda: attention(512, 0.0),
        "layer_norm": lambda: layer_norm(rows, 0.1),
        "layer_norm-bare": lambda: layer_norm(None, 0.0),
        "bias_gelu-erf": lambda: bias_gelu("none"),
        "bias_gelu-tanh": lambda: bias_gelu("tanh"),
        "gelu_layer_norm": lambda: gelu_layer_norm("none"),
        "embedding": lambda: embedding(0.1),
        "cross_entropy": lambda: cross_entropy(0.0),
        "cross_entropy-smoothed": lambda: cross_entropy(0.1),
    }


def offline_driver(name):
    """(driver, records): a Triton driver for target `name` that records launches instead of running them."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    capability, shared_limit = TARGETS[name]
    records = []
    properties = dict(max_shared_mem=shared_limit, multiprocessor_count=132, warpSize=32, max_num_regs=65536)

    class OfflineDriver(DriverBase):
        def __init__(self):
            self.utils = SimpleNamespace(
                get_device_properties=lambda device: properties,
                # module, function, registers, spills, most threads: only the last is looked at
                load_binary=lambda *arguments: (object(), 0, 0, 0, 1024),
            )

        def launcher_cls(self, source, metadata):
            def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
                records.append(SimpleNamespace(source=source, metadata=metadata, grid=(x, y, z), arguments=arguments))

            return launch

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return f"offline {name}"

        def get_current_stream(self, device):
            return 0

        def get_active_torch_device(self):
            return torch.device("meta")

        def map_python_to_cpp_type(self, kind):
            return kind

        def get_benchmarker(self):
            raise RuntimeError("nothing can be timed without a device")

        @classmethod
        def is_active(cls):
            return True

    return OfflineDriver(), records


def tool(name, cubin, *arguments):
    """What a tool of NVIDIA's, as shipped with Triton, prints about a cubin."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def report(asm):
    """What a compiled kernel uses. Spills show as stack, and as loads and stores of local memory, but not as LOCAL."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", asm["cubin"], "-res-usage"))
    sass = tool("cuobjdump", asm["cubin"], "-sass")
    return dict(
        registers=int(usage[1]),
        stack=int(usage[2]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        dots=asm["ttir"].count("tt.dot "),
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
        # of any generation: Ampere's, Hopper's, Blackwell's
        tensor_cores=len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass)),
        two_bytes=len(re.findall(r"\b(?:LDG|STG)\.E\.U16\b", sass)),
        atomics=len(re.findall(r"\b(?:atom|red)\.", asm["ptx"])),
    )


_LIMIT = 1 << 31
_DATA = (-(1 << 20), 1 << 30)  # what is read from memory: a row's number, or a sign that there is none
_SAME = {"tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "arith.extsi", "arith.trunci"}
_LINE = re.compile(r"^\s*%([\w.]+)(?::\d+)? = ([\w.]+)(.*)")
_LOOP = re.compile(r"scf\.for %([\w.]+) = %([\w.]+) to %([\w.]+) step")


def narrow_offsets(ttir, scalars, grid):
    """Lines of a kernel's IR where 32-bit arithmetic on the way to an address passes 2^31 in this launch.

    Follows the range of every integer from the launch's grid and arguments. `scalars`: the integer arguments by name.
    """
    ranges, uses, too_large, found = dict.fromkeys(scalars, _DATA), {}, {}, []
    ranges |= {name: (value, value) for name, value in scalars.items()}
    for line in ttir.splitlines():
        if loop := _LOOP.search(line):
            name, first, last = loop.groups()
            low, high = ranges.get(first, _DATA)[0], ranges.get(last, _DATA)[1] - 1
            ranges[name] = low, max(low, high)
            uses[name] = [first, last]
        match = _LINE.match(line)
        if not match or match[2] == "scf.for":
            continue
        name, op, rest = match.groups()
        rest = rest.split(" loc(")[0]
        operands = re.findall(r"%([\w.]+)", rest)
        if op == "tt.addptr":
            reached, queue = set(), [operands[1]]
            while queue:
                value = queue.pop()
                if value not in reached:
                    reached.add(value)
                    queue += uses.get(value, [])
            found += [too_large[value] for value in sorted(reached & set(too_large))]
            continue
        value = _range(op, rest, [ranges.get(operand, _DATA) for operand in operands], grid)
        if value is None:
            continue
        uses[name] = operands
        if re.search(r"\bi32\b|xi32>", rest.split(" to ")[-1]) and not -_LIMIT <= value[0] <= value[1] < _LIMIT:
            too_large[name] = line.split(" loc(")[0].strip()
            value = _DATA
        ranges[name] = value
    return sorted(set(found))


def _range(op, rest, inputs, grid):
    """(lowest, highest) that an integer operation gives, or None for what is no address arithmetic."""
    if op == "arith.constant":
        number = re.match(r"\s*(?:dense<)?(-?\d+)>? : (?:tensor<[\dx]+x)?i\d", rest)
        return (int(number[1]),) * 2 if number else None
    if op == "tt.get_program_id":
        return 0, grid["xyz".index(rest.split()[0])] - 1
    if op == "tt.get_num_programs":
        return (grid["xyz".index(rest.split()[0])],) * 2
    if op == "tt.make_range":
        start, end = (int(re.search(key + r" = (\d+)", rest)[1]) for key in ("start", "end"))
        return start, end - 1
    if op in _SAME:
        return inputs[0]
    if op in ("arith.addi", "arith.subi", "arith.muli", "arith.divsi", "arith.remsi", "arith.minsi", "arith.maxsi"):
        a, b = inputs
        if op == "arith.subi":
            return a[0] - b[1], a[1] - b[0]
        if op == "arith.remsi":
            return 0 if a[0] >= 0 else 1 - b[1], b[1] - 1
        if op == "arith.divsi":
            return (a[0] // b[0], a[1] // b[0]) if 0 < b[0] == b[1] else a
        pairs = {"arith.addi": int.__add__, "arith.muli": int.__mul__, "arith.minsi": min, "arith.maxsi": max}[op]
        values = [pairs(x, y) for x, y in ((a[0], b[0]), (a[0], b[1]), (a[1], b[0]), (a[1], b[1]))]
        if op == "arith.addi":
            values = [a[0] + b[0], a[1] + b[1]]
        return min(values), max(values)
    return None


def _submit(pool, record, driver):
    """The compiled kernel of a recorded launch, and its report, which is on its way."""
    kernels = record.source.fn.device_caches[driver.get_current_device()][0].values()
    asm = next(kernel.asm for kernel in kernels if kernel.metadata.hash == record.metadata.hash)
    return asm, pool.submit(report, asm)


def _facts(record, asm, used):
    signature = record.source.signature
    integers = {name: value for name, value in zip(signature, record.arguments) if isinstance(value, int)}
    # Triton 3.4 numbers the arguments in its IR, where later versions name them
    numbered = enumerate(name for name, kind in signature.items() if kind != "constexpr")
    integers |= {f"arg{i}": integers[name] for i, name in numbered if name in integers}
    return dict(
        kernel=record.metadata.name,
        warps=record.metadata.num_warps,
        shared=record.metadata.shared,
        narrow_offsets=narrow_offsets(asm["ttir"], integers, record.grid),
        **used,
    )


def main(target, dtype, *names):
    from triton.runtime import driver

    sys.path.insert(0, str(ROOT))
    offline, records = offline_driver(target)
    driver.set_active(offline)
    results = {}
    with ThreadPoolExecutor(1) as pool:  # the tools work while the compiler does
        for name, run in cases(getattr(torch, dtype)).items():
            if names and name not in names:
                continue
            records.clear()
            try:
                run()
            except Exception as error:  # one kernel that does not compile must not hide the others
                results[name] = f"{type(error).__name__}: {error}"
                continue
            kernels = {record.metadata.hash: record for record in records}
            results[name] = [(record, *_submit(pool, record, offline)) for record in kernels.values()]
        for name, launches in results.items():
            if not isinstance(launches, str):
                results[name] = [_facts(record, asm, future.result()) for record, asm, future in launches]
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
