"""What the compiler made of a kernel: registers, occupancy, tensor cores, the instructions of its inner loop.

Reads the intermediate code and the machine code that Triton keeps of a compiled kernel. No GPU is needed. Triton's
cuobjdump disassembles NVIDIA's code; AMD's is text. Nothing here was checked against a device: the estimates ignore
latency and waits for memory and barriers, and the instruction rates are public figures.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple


class Architecture(NamedTuple):
    """What a GPU offers. On AMD a multiprocessor is a compute unit and a warp is a wavefront."""

    # Triton's backend
    backend: str
    # Triton's name of the architecture
    target: object
    # threads per warp
    warp: int
    # of the device in the comment at each row
    multiprocessors: int
    # most bytes of shared memory per program
    program_shared: int
    # bytes of shared memory per multiprocessor
    shared: int
    # most warps per multiprocessor
    warps: int
    # most programs per multiprocessor
    programs: int


# NVIDIA: CUDA Programming Guide, "Compute Capabilities"; the system takes 1 KiB of each program's shared memory.
# AMD: CDNA3 instruction set architecture; 16 programs, since they have barriers
ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 108, 163 << 10, 164 << 10, 64, 32),  # A100
    "sm_86": Architecture("cuda", 86, 32, 84, 99 << 10, 100 << 10, 48, 16),  # A40
    "sm_89": Architecture("cuda", 89, 32, 142, 99 << 10, 100 << 10, 48, 24),  # L40S
    "sm_90": Architecture("cuda", 90, 32, 132, 227 << 10, 228 << 10, 64, 32),  # H100, H200
    "sm_100": Architecture("cuda", 100, 32, 148, 227 << 10, 228 << 10, 64, 32),  # B200
    "sm_120": Architecture("cuda", 120, 32, 188, 99 << 10, 100 << 10, 48, 24),  # RTX PRO 6000 Blackwell
    "gfx942": Architecture("hip", "gfx942", 64, 304, 64 << 10, 64 << 10, 32, 16),  # MI300X
}


def occupancy(arch, registers, warps, shared):
    """(programs that fit on a multiprocessor, what limits them) for programs of `warps` warps.

    registers: per thread. shared: bytes per program. This is an upper bound: a small launch fills less.
    """
    limits = ARCHITECTURES[arch]
    if limits.backend == "cuda":
        # 65536 registers, allocated per warp in units of 256, for four warps at a time
        held = 65536 // max(_up(registers * 32, 256), 256) // 4 * 4
        # the system takes 1 KiB of shared memory per program
        taken = _up(shared, 128) + 1024
    else:
        # four SIMDs with 512 registers per lane, allocated in units of 8, and at most 8 warps each
        held = 4 * min(512 // max(_up(registers, 8), 8), 8)
        taken = max(shared, 1)
    # of equal limits the first is named
    by = {
        "warps": limits.warps // warps,
        "programs": limits.programs,
        "registers": held // warps,
        "shared": limits.shared // taken,
    }
    limit = min(by, key=by.get)
    return by[limit], limit


def _up(size, multiple):
    return -(-size // multiple) * multiple


def read(arch, asm, metadata):
    """What a kernel uses. asm: Triton's {stage: code} of the compiled kernel; metadata: Triton's. Returns a dict:

    registers     per thread
    stack         bytes per thread; only spilled registers need it
    spills        number of loads and stores of spilled registers
    tensor        {tensor-core instruction: number}
    dots          [rows, columns, depth, dtype, instruction] of each tl.dot; "FMA" without tensor cores
    widths        {bytes: number of loads and stores of global memory with this width}
    wide_share    share of the bytes that a thread moves in 16-byte accesses
    atomics       number of atomic operations
    warnings      of ptxas about performance
    waits         [waits for Hopper's asynchronous products in the machine code, waits in Triton's code]
    loop          number of instructions in the busiest loop, by kind; in the whole kernel if no loop has a tenth of
                  the work. "slots" is their sum, "whole" whether they are of the whole kernel
    cycles        {unit: cycles that it is busy for a pass of four warps through that loop}; the busiest unit is the
                  bound if nothing waits. {} if the rates of the architecture are not known here
    """
    report = _read_amd(asm["amdgcn"]) if "amdgcn" in asm else _read_nvidia(asm, metadata)
    instructions, branches = report.pop("instructions"), report.pop("branches")
    kinds = [_kind(name) for name in instructions]
    first, last = _busiest_loop(kinds, branches)
    widths = Counter(filter(None, map(_global_bytes, instructions)))
    loop = Counter(kinds[first : last + 1])
    return report | dict(
        tensor=dict(Counter(_tensor_name(name) for name, kind in zip(instructions, kinds) if kind == "tensor")),
        dots=dots(asm["ttgir"]),
        widths={str(width): widths[width] for width in sorted(widths)},
        wide_share=widths[16] * 16 / max(sum(width * number for width, number in widths.items()), 1),
        loop={kind: loop[kind] for kind in KINDS} | dict(slots=last + 1 - first, whole=last + 1 - first == len(kinds)),
        cycles=_cycles(arch, instructions[first : last + 1], kinds[first : last + 1]),
    )


# a line of cuobjdump: address, predicate, name, arguments; a branch's target is an address
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)


def _read_nvidia(asm, metadata):
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(asm["cubin"], "-res-usage"))
    lines = _SASS.findall(_cuobjdump(asm["cubin"], "-sass"))
    places, branches = {address: i for i, (address, _, _) in enumerate(lines)}, []
    for i, (_, name, arguments) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)\s*$", arguments)
        if name.split(".")[0] == "BRA" and target:
            branches.append((places.get(target[1].zfill(4), i), i))
    return dict(
        registers=int(usage[1]),
        stack=int(usage[2]),
        # not LOCAL: it is 0 even when registers spill
        spills=sum(name.split(".")[0] in ("LDL", "STL") for _, name, _ in lines),
        atomics=len(re.findall(r"\b(?:atom|red)\.", asm["ptx"])),
        warnings=_ptxas_warnings(asm["ptx"], metadata),
        waits=[
            sum(name.startswith("WARPGROUP.DEPBAR") for _, name, _ in lines),
            # a product that is not asynchronous waits for itself
            len(re.findall(r"ttng\.warp_group_dot_wait|ttng\.warp_group_dot (?!.*isAsync = true)", asm["ttgir"])),
        ],
        instructions=[name for _, name, _ in lines],
        branches=branches,
    )


def _ptxas_warnings(ptx, metadata):
    """ptxas's warnings about performance. Triton discards them, so the last step of compiling runs again (0.2 s).

    Other messages are left out: "(C7519) warpgroup.arrive is injected", for example, costs one instruction.
    """
    from triton import knobs
    from triton.compiler.compiler import make_backend

    backend, log = make_backend(metadata.target), io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(ptx, {}, backend.parse_options(metadata._asdict()), metadata.target.arch)
    pattern = r"\(C75\d\d\) Potential Performance Loss: .*?(?= in the function|$)"
    return sorted(set(re.findall(pattern, log.getvalue(), re.MULTILINE)))


def _cuobjdump(cubin, option):
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_amd(text):
    def number(name):
        return int(re.search(rf"^\s*[.;] ?{name}:\s+(\d+)", text, re.MULTILINE)[1])

    # from the kernel's label to its end; a description of the kernel follows
    instructions, labels, jumps = [], {}, []
    for line in text.partition("s_endpgm\n.Lfunc_end")[0].splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\t((?:[vs]|ds|global|buffer|flat|scratch)_\w+)(.*)", line):
            if code[1].startswith(("s_cbranch", "s_branch")):
                jumps.append((code[2].split()[0], len(instructions)))
            instructions.append(code[1])
    return dict(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count"),
        atomics=sum("_atomic_" in name for name in instructions),
        warnings=[],
        waits=[0, 0],
        instructions=instructions,
        branches=[(labels.get(label, place), place) for label, place in jumps],
    )


_NVIDIA_KINDS = {
    "tensor": "HMMA HGMMA QGMMA IGMMA IMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "mufu": "MUFU",
    "fp32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2 DFMA DADD DMUL",
    # the rest of the integer and comparison pipe, with conversions and selects
    "int": "IADD IADD3 IMAD LOP3 LOP LEA SHF SEL ISETP MOV PRMT VIADD VIMNMX IMNMX VIADDMNMX VIMNMX3 PLOP3 IABS SGXT "
    "BMSK P2R R2P CS2R FMNMX FMNMX3 FSEL FSETP FSET FCHK F2FP F2F I2F F2I I2FP FLO POPC HSET2 HSETP2 HMNMX2 IDP",
    "shared": "LDS STS LDSM STSM ATOMS SHFL REDUX LDTM STTM MATCH MOVM VOTE",
    "global": "LDG STG LDGSTS LD ST RED REDG ATOM ATOMG LDL STL UTMALDG UTMASTG UBLKCP LDC LDCU",
    "sync": "BAR SYNCS WARPGROUP WARPSYNC LDGDEPBAR DEPBAR MEMBAR FENCE ERRBAR CCTL BSYNC BSSY UTCBAR NANOSLEEP",
}
KINDS = (*_NVIDIA_KINDS, "other")
_KIND_OF = {name: kind for kind, names in _NVIDIA_KINDS.items() for name in names.split()}

_AMD_KINDS = {
    "tensor": r"v_s?mfma",
    "mufu": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "fp32": r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac|mad|fmaak|fmamk)_(legacy_)?(f|mix)",
    "int": r"v_",
    "shared": r"ds_",
    "global": r"(global|buffer|flat|scratch|s_load|s_buffer)_",
    "sync": r"s_(barrier|waitcnt|sleep)",
}


def _kind(name):
    if name[0].isupper():
        return _KIND_OF.get(name.split(".")[0], "other")
    return next((kind for kind, pattern in _AMD_KINDS.items() if re.match(pattern, name)), "other")


def _tensor_name(name):
    return "MFMA" if name.startswith("v_") else name.split(".")[0]


_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}


def _global_bytes(name):
    """Bytes of global memory that an instruction moves per thread; None for other instructions."""
    parts = name.split(".")
    if parts[0] in ("LDG", "STG", "LDGSTS"):
        width = next((part for part in parts if part in ("128", "64", "U16", "S16", "U8", "S8")), "32")
        return int(width.lstrip("US")) // 8
    if access := re.match(r"(?:global|buffer|flat)_(?:load|store)_(?:lds_)?s?([a-z]+\d?)", name):
        return _AMD_BYTES.get(access[1])
    return None


def _busiest_loop(kinds, branches):
    """(first, last) instruction of the innermost loop with most work; of the kernel if no loop has a tenth of it."""
    loops = [(target, i) for target, i in branches if target < i]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    everything = 0, len(kinds) - 1

    def work(loop):
        counts = Counter(kinds[loop[0] : loop[1] + 1])
        return counts["tensor"] * 64 + counts["mufu"] * 8 + counts["fp32"]

    busiest = max(inner, key=work, default=everything)
    return busiest if work(busiest) * 10 > work(everything) else everything


def _cycles(arch, instructions, kinds):
    """{unit: cycles that a warp's instructions keep it busy} for a quarter of a multiprocessor.

    One instruction is issued per cycle. It takes 1 cycle of the fp32 unit (2 on sm_80, and 2 for integer products,
    which run there), 2 of the unit for other integers and comparisons, 4 of memory, 8 of the special functions. Per
    cycle a multiprocessor multiplies and adds 1024 16-bit numbers with HMMA, 2048 with HGMMA, half as many in tf32.

    Source: CUDA Programming Guide, "Arithmetic Instructions"; Nsight Compute, "Pipelines".
    """
    if arch not in ("sm_80", "sm_90"):
        return {}
    tensor = 0.0
    for name, kind in zip(instructions, kinds):
        if kind != "tensor":
            continue
        if size := re.search(r"\.(\d+)x(\d+)x(\d+)", name):
            rows, columns, depth = map(int, size.groups())
            tensor += rows * columns * depth / (1024 if "TF32" in name else 2048)
        else:
            # four warps run on the four quarters at the same time
            depth = 16 if ".16816" in name else 8
            tensor += 4 * 16 * 8 * depth / (512 if "TF32" in name else 1024)
    count = Counter(kinds)
    products = sum(name.startswith("IMAD") for name in instructions)
    return dict(
        tensor=round(tensor),
        mufu=8 * count["mufu"],
        fp32=(2 if arch == "sm_80" else 1) * count["fp32"] + 2 * products,
        int=2 * (count["int"] - products),
        memory=4 * (count["shared"] + count["global"]),
        issue=len(kinds),
    )


_DOT = re.compile(
    r"(ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.dot) .*? : (?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x(\w+),.*"
)


def dots(ttgir):
    """[rows, columns, depth, dtype of the operands, instruction] of each product in Triton's GPU code."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(\w+)<", ttgir, re.MULTILINE))
    found = []
    for line in ttgir.splitlines():
        match = _DOT.search(line)
        if not match:
            continue
        op, rows, depth, dtype = match.groups()
        columns = re.findall(r"<\d+x(\d+)x\w+,", line.split(" : ", 1)[1])[1]
        layout = re.search(r"-> tensor<[^,]*, (?:(#\w+)>|#ttg\.(\w+)<)", line)
        if op == "tt.dot":
            kind = layouts.get(layout[1], layout[2])
            by = {"nvidia_mma": "HMMA", "amd_mfma": "MFMA"}.get(kind, "FMA")
        else:
            by = "HGMMA" if op == "ttng.warp_group_dot" else "UTCHMMA"
        found.append([int(rows), int(columns), int(depth), dtype, by])
    return found


_LIMIT = 1 << 31
# range of a value that is read from memory: a row number, or a sign that there is none. A few may be added in 32 bits;
# multiplied by a stride of 8 or more they need 64
_DATA = (-(1 << 20), 1 << 28)
_SAME = {"tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "arith.extsi", "arith.trunci"}
_ARITHMETIC = {
    "arith.addi": int.__add__, "arith.subi": int.__sub__, "arith.muli": int.__mul__, "arith.minsi": min,
    "arith.maxsi": max,
}  # fmt: skip
_LINE = re.compile(r"^\s*%([\w.]+)(?::\d+)? = ([\w.]+)(.*)")
_LOOP = re.compile(r"scf\.for %([\w.]+) = %([\w.]+) to %([\w.]+) step")


def narrow_offsets(ttir, scalars, grid):
    """Lines of a kernel's IR where 32-bit arithmetic for an address passes 2^31 in this launch.

    Computes the range of every integer from the launch's grid and arguments. scalars: integer arguments by name.
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
        kind = re.split(r" to | -> | : ", rest)[-1]
        if re.search(r"\bi32\b|xi32>", kind) and not -_LIMIT <= value[0] <= value[1] < _LIMIT:
            too_large[name] = line.split(" loc(")[0].strip()
            value = _DATA
        ranges[name] = value
    return sorted(set(found))


def _range(op, rest, inputs, grid):
    """(lowest, highest) result of an integer operation; None for operations that compute no address."""
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
    if op == "arith.select" and re.search(r"i\d+>?$", rest.strip()):
        return min(inputs[1][0], inputs[2][0]), max(inputs[1][1], inputs[2][1])
    if op == "arith.remsi":
        (low, _), (_, divisor) = inputs
        return 0 if low >= 0 else 1 - divisor, divisor - 1
    if op == "arith.divsi":
        (low, high), (least, most) = inputs
        return (low // most, high // most) if 0 < least == most else (low, high)
    if op in _ARITHMETIC:
        # each is largest and smallest where both inputs are
        values = [_ARITHMETIC[op](x, y) for x in inputs[0] for y in inputs[1]]
        return min(values), max(values)
    return None
