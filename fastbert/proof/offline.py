"""Compile the kernels for GPUs that are not here, as their launchers launch them, and report what the compiler made.

A Triton driver without a device stands in for the real one. It records each launch instead of running it, so everything
above it is real: block sizes, specialisation, shared memory limits, the disk cache. Tensors are on the "meta" device,
where matrix products cost nothing.

Triton decides between compiler and interpreter when it is imported, so TRITON_INTERPRET must not be set.
"""

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .. import ops
from . import machine_code, op_cases
from .machine_code import ARCHITECTURES
from .op_cases import TABLE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODELS = [model for model in op_cases.MODELS if any(model in op.models for op in TABLE.values())]


class _Kernels(TorchDispatchMode):
    """Operators of fastbert run their launchers on meta tensors, which would otherwise get to the fakes."""

    @classmethod
    def _should_skip_dynamo(cls):
        # nothing is traced here, and importing what would skip takes seconds
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastbert":
            return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@functools.cache
def offline_driver(arch):
    """The one driver of a process that plays a GPU of architecture `arch`; `records` is the list of its launches.

    One, because a compiled kernel keeps the launcher that it was first given.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    limits = ARCHITECTURES[arch]
    properties = dict(
        max_shared_mem=limits.program_shared,
        multiprocessor_count=limits.multiprocessors,
        warpSize=limits.warp,
        max_num_regs=65536,
    )

    class OfflineDriver(DriverBase):
        def __init__(self):
            self.records = []
            self.utils = SimpleNamespace(
                get_device_properties=lambda device: properties,
                # module, function, registers, spills, most threads: only the last is looked at
                load_binary=lambda *arguments: (object(), 0, 0, 0, 1024),
            )

        def launcher_cls(self, source, metadata):
            def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
                self.records.append(
                    SimpleNamespace(
                        source=source, metadata=metadata, grid=(x, y, z), arguments=arguments, is_candidate=False
                    )
                )

            return launch

        def get_current_target(self):
            return GPUTarget(limits.backend, limits.target, limits.warp)

        def get_current_device(self):
            # the key of Triton's caches: another one for each architecture
            return f"offline {arch}"

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

    return OfflineDriver()


def compile_launches(arch, run):
    """What the compiler made of each kernel that `run()` launches: a list of dicts, see `machine_code.read`.

    Beside that: "hash" of the compiled kernel, "kernel", "settings" (warps, stages, constants), "shared" (bytes of a
    program), "occupancy", "narrow_offsets", "is_candidate". Triton's driver is as before afterwards.
    """
    from triton.runtime import driver

    offline, before = offline_driver(arch), driver._active
    offline.records.clear()
    # not reset_active(), which would look for a device
    driver._active = offline
    try:
        with _Kernels():
            run()
    finally:
        driver._active = before
    return _merged([_row(arch, record, offline) for record in offline.records])


def _merged(rows):
    """One row for each compiled kernel of an op, with the uses of all."""
    merged = {}
    for row in rows:
        key = row["hash"], row.get("op"), row.get("arch"), row.get("dtype")
        known = merged.setdefault(key, row | dict(uses=[]))
        known["uses"] += row["uses"]
        known["narrow_offsets"] = sorted({*known["narrow_offsets"], *row["narrow_offsets"]})
        known["is_candidate"] &= row["is_candidate"]
    return list(merged.values())


def _row(arch, record, driver):
    metadata, source = record.metadata, record.source
    kernels = source.fn.device_caches[driver.get_current_device()][0].values()
    asm = next(kernel.asm for kernel in kernels if kernel.metadata.hash == metadata.hash)
    report = _read(arch, metadata, asm)
    constants = {list(source.signature)[place[0]]: x for place, x in source.constants.items() if len(place) == 1}
    integers = {name: value for name, value in zip(source.signature, record.arguments) if type(value) is int}
    programs, limit = machine_code.occupancy(arch, report["registers"], metadata.num_warps, metadata.shared)
    return dict(
        hash=metadata.hash,
        kernel=metadata.name,
        # AMD's compiler knows no maxnreg
        settings=dict(warps=metadata.num_warps, stages=metadata.num_stages, maxnreg=getattr(metadata, "maxnreg", None))
        | {name: value for name, value in constants.items() if isinstance(value, int | float | str)},
        shared=metadata.shared,
        occupancy=dict(
            programs=programs, warps=programs * metadata.num_warps, of=ARCHITECTURES[arch].warps, limit=limit
        ),
        narrow_offsets=machine_code.narrow_offsets(asm["ttir"], integers, record.grid),
        is_candidate=record.is_candidate,
        uses=[],
        **report,
    )


@functools.cache
def _reader():
    return hashlib.sha256(Path(machine_code.__file__).read_bytes()).hexdigest()


def _read(arch, metadata, asm):
    """`machine_code.read`, kept beside Triton's compiled kernels: taking a large one apart takes most of a second."""
    from triton.runtime.cache import get_cache_manager

    key = hashlib.sha256(f"{metadata.hash} {arch} {_reader()}".encode()).hexdigest()
    cache, name = get_cache_manager(key), "machine_code.json"
    if file := cache.get_file(name):
        return json.loads(Path(file).read_text(encoding="utf-8"))
    report = machine_code.read(arch, asm, metadata)
    cache.put(json.dumps(report), name, binary=False)
    return report


def _compile_case(arch, dtype, op, case, models, candidates):
    """Rows of one case, for each of `models`; with "error" in place of the figures where there are none."""
    from ..kernels import _launch

    # not the profile of a GPU that happens to be here
    _launch.device_name = lambda: "none"
    if candidates:
        _launch.AUTOTUNE, _launch.microseconds = True, functools.partial(_compile_candidate, offline_driver(arch))

    def call(model):
        arguments = op_cases.without_data(op, model, DTYPES[dtype], **TABLE[op].compiled[case])
        run = op_cases.run_of(functools.partial(getattr(ops, op), impl="triton"), arguments)
        output = run.forward()
        torch.autograd.grad(output, run.leaves, torch.empty_like(output))

    rows = []
    for model in models:
        _launch.profile_of.cache_clear()
        try:
            found = compile_launches(arch, lambda: call(model))  # noqa: B023
        except Exception as error:  # one kernel that does not compile must not hide the others
            found = [_failure(f"{type(error).__name__}: {error}")]
        rows += [row | dict(arch=arch, dtype=dtype, op=op, uses=[dict(model=model, case=case)]) for row in found]
    return rows


def _failure(reason):
    reason = " ".join(reason.split())
    return dict(hash=reason, kernel="", narrow_offsets=[], is_candidate=False, error=reason)


def _compile_candidate(driver, call):
    """In place of a timing: candidates are as fast as the default."""
    before = len(driver.records)
    call()
    for record in driver.records[before:]:
        record.is_candidate = True
    return 0.0


def check(archs, dtypes, models, op_names):
    """Raise ValueError, one line of it, where `report` could not work."""
    known = (("architecture", archs, ARCHITECTURES), ("dtype", dtypes, DTYPES), ("model", models, MODELS))
    for kind, given, table in (*known, ("op", op_names, TABLE)):
        for name in given:
            if name not in table:
                raise ValueError(f"no {kind} is called {name!r}: expected one of {', '.join(table)}")
    if not ops.has_triton():
        raise ValueError("Triton is not installed, and it is what compiles the kernels")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set: Triton then interprets kernels and compiles none; unset it")


def report(archs, dtypes, models, op_names, *, candidates=False, on_progress=lambda done, total: None):
    """What the compiler made of every kernel: a list of dicts, see `compile_launches`, one for each compiled kernel.

    archs, dtypes, models, op_names: of ARCHITECTURES, DTYPES, MODELS and TABLE. candidates: also the settings that a
    search would try. Beside the rest each row has "arch", "dtype", "op", "uses" ([{"model", "case"}]), "problems" and
    "remarks" (sentences). A case that could not be compiled has "error" instead of figures.

    Kernels are compiled in as many processes as there are cores; Triton keeps them on disk. Raises ValueError for
    unknown names and where no kernel can be compiled.
    """
    check(archs, dtypes, models, op_names)
    tasks = []
    for arch, dtype, op in itertools.product(archs, dtypes, op_names):
        users = tuple(model for model in models if model in TABLE[op].models)
        if users:
            tasks += [(arch, dtype, op, case, users, candidates) for case in TABLE[op].compiled]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    results = {}
    for task, rows in _in_processes(tasks, min(cores, len(tasks))):
        if rows is None:
            # a compiler's crash takes all processes down: alone, it shows whose it was
            rows = next(_in_processes([task], 1))[1] or _crash(*task)
        results[task] = rows
        on_progress(len(results), len(tasks))
    merged = _merged(itertools.chain.from_iterable(results[task] for task in tasks))
    return [row | judge(row) for row in merged]


def _in_processes(tasks, workers):
    """(task, its rows) in the order in which they are done; None for rows where the process died."""
    # not forked: the parent may use a GPU, and threads
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile_case, *task): task for task in tasks}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], None


def _crash(arch, dtype, op, case, models, candidates):
    uses = [dict(model=model, case=case) for model in models]
    return [_failure("the compiler crashed") | dict(arch=arch, dtype=dtype, op=op, uses=uses)]


def judge(row):
    """{"problems": what must not be, "remarks": what is worth a look}, sentences, for a row of `report`."""
    if "error" in row:
        return dict(problems=[f"does not compile: {row['error']}"], remarks=[])
    problems, remarks = [], []
    if row["stack"] or row["spills"]:
        problems.append(f"registers spill: {row['stack']} bytes of stack, {row['spills']} loads and stores of it")
    if row["atomics"]:
        problems.append(f"{row['atomics']} atomics: results depend on the order of programs")
    problems += [f"ptxas warns: {warning}" for warning in row["warnings"]]
    waits, asked = row["waits"]
    if waits > asked:
        problems.append(f"products are serialised: {waits} waits for them, {asked} of them in Triton's code")
    problems += [f"a 32-bit offset overflows: {line}" for line in row["narrow_offsets"]]
    # the same product stands several times in code that is peeled or pipelined
    for rows, columns, depth, dtype, by in sorted({tuple(dot) for dot in row["dots"]}):
        size = f"the product [{rows}, {depth}] x [{depth}, {columns}] in {dtype}"
        if by == "FMA" and dtype != "f32":
            problems.append(f"{size} uses no tensor core")
        elif by in ("HMMA", "HGMMA", "UTCHMMA") and dtype == "f32":
            problems.append(f"{size} is rounded to tf32, which nobody asked for")
        elif by == "HMMA" and row["arch"] == "sm_90":
            # a warpgroup multiplies 64 rows by a multiple of 8 columns
            if rows % 64 or columns % 8 or row["settings"]["warps"] % 4:
                remarks.append("products of too few rows or warps for Hopper's HGMMA use HMMA")
            else:
                problems.append(f"{size} uses HMMA, not Hopper's HGMMA")
        elif by == "HMMA" and row["arch"] == "sm_100":
            remarks.append("products use HMMA, not Blackwell's UTCHMMA")
    # a few scalars may be moved so; a tile that is has lost its vector loads, most often to a mask at an odd size
    if (narrow := row["widths"].get("2", 0)) > 4:
        remarks.append(f"{narrow} loads or stores of two bytes")
    return dict(problems=problems, remarks=sorted(set(remarks)))
