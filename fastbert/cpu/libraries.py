"""Which of torch's two matrix libraries multiplies: oneDNN, or torch's own choice (MKL on x86).

Neither is faster everywhere. It depends on the processor, on the layout of the operands (the gradient of a weight reads
both by columns) and on the size. So each kind of product is timed once in each class of sizes, on the machine it runs
on. The times are kept in a file for each processor, number of threads and version of torch.

The environment variable FASTBERT_MATMUL pins the choice: auto (the default), onednn or torch.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:
    # Windows
    resource = None

CHOICES = ("auto", "onednn", "torch")
PINNED = os.environ.get("FASTBERT_MATMUL", "auto")
if PINNED not in CHOICES:
    raise ValueError(f"FASTBERT_MATMUL={PINNED!r}: expected one of {', '.join(CHOICES)}")

# below 2**20 multiply-adds oneDNN's set-up, under a millisecond per new shape, costs more than it saves
LEAST = 2**20
# a class of sizes is timed with at most so many multiply-adds: 6 ms at 100 GFLOP/s
MOST = 3 * 10**8
# seconds to time a class, if that is enough for three rounds
_SECONDS = 0.04
# so far the second shortest time of a library may be from its shortest, for times that are worth keeping
_AGREE = 1.15

# (kind, sizes, threads) -> whether oneDNN multiplies
_known = {}
# the same -> times
_timed = {}
# {class: "onednn" or "torch"} that a run was begun with; "every": one library for all
_restored = {}
# candidates for attention multiply, too
_lock = threading.RLock()


def prefers_onednn(kind: str, sizes: tuple[int, ...], candidates: Callable) -> bool:
    """Whether oneDNN is the faster one for products of this kind and size.

    candidates(kind, sizes): two functions without arguments, one product of that kind and size by each library.
    """
    key = kind, sizes, torch.get_num_threads()
    found = _known.get(key)
    if found is None:
        with _lock:
            found = _known[key] = _decide(kind, sizes, key[2], candidates)
    return found


def _decide(kind, sizes, threads, candidates):
    pinned = _restored.get("every", PINNED)
    if pinned != "auto":
        return pinned == "onednn"
    name = class_of(kind, sizes)
    if name in _restored:
        return _restored[name] == "onednn"
    onednn, own = _times(name, threads, candidates)
    return onednn < own


def class_of(kind: str, sizes: tuple[int, ...]) -> str:
    """The name of the class that a product belongs to, such as "forward 384 x 768 x 768": its kind, and the sizes that
    it is timed with.

    Each size is rounded to 3 * 2**n, as the widths of most models are: (2**(n+1), 2**(n+2)] -> 3 * 2**n. The largest is
    halved until the product has at most MOST multiply-adds.
    """
    rounded = [3 << max((size - 1).bit_length() - 2, 0) if size > 2 else size for size in sizes]
    while math.prod(rounded) > MOST:
        rounded[rounded.index(max(rounded))] //= 2
    return f"{kind} {' x '.join(map(str, rounded))}"


def share_saved(kind: str, sizes: tuple[int, ...], candidates: Callable) -> tuple[float, float]:
    """(seconds that a product takes by torch's own choice, what share of them oneDNN saves; 0 where it saves none or is
    not taken).

    Where nothing is measured, because a library is pinned, a product takes what it does at 100 GFLOP/s.
    """
    pinned = _restored.get("every", PINNED)
    if pinned != "auto":
        return 2 * math.prod(sizes) / 1e11, 0.0
    name = class_of(kind, sizes)
    onednn, own = _times(name, torch.get_num_threads(), candidates)
    measured = math.prod(map(int, name.partition(" ")[2].split(" x ")))
    saved = max(1 - onednn / own, 0.0) if math.prod(sizes) >= LEAST and prefers_onednn(kind, sizes, candidates) else 0.0
    return own * math.prod(sizes) / measured, saved


def measured(kind: str, sizes: tuple[int, ...], candidates: Callable) -> tuple[float, float]:
    """The seconds of the two functions candidates(kind, sizes) in the class of these sizes, from the file or measured,
    once in a process."""
    threads = torch.get_num_threads()
    found = _timed.get((kind, sizes, threads))
    if found is None:
        with _lock:
            found = _timed[kind, sizes, threads] = tuple(_times(class_of(kind, sizes), threads, candidates))
    return found


def _times(name, threads, candidates):
    """(seconds of oneDNN, seconds of torch) in a class: from the file, or measured."""
    path = _file(threads)
    times = _read(path)
    if name not in times:
        kind, *sizes = name.replace(" x ", " ").split(" ")
        # a candidate may have a backward
        with torch.inference_mode(False):
            seconds, is_calm = zip(*_measure(*candidates(kind, tuple(map(int, sizes)))))
        times[name] = seconds
        # on a busy machine the next process measures again
        if all(is_calm):
            # others may have measured meanwhile
            _write(path, {name: seconds} | _read(path))
    return times[name]


def _measure(*calls):
    """[(seconds, whether they can be relied on)] of several functions, which take turns.

    A round counts if no other process took a core away in it. The shortest time of those is relied on if another was
    almost as short.
    """
    rounds, end = [[] for _ in calls], time.perf_counter() + _SECONDS
    with torch.no_grad():
        for call in calls:
            call()
        while len(rounds[0]) < 3 or time.perf_counter() < end:
            for call, found in zip(calls, rounds):
                taken, began = _taken(), time.perf_counter()
                call()
                seconds = time.perf_counter() - began
                found.append((_taken() - taken, seconds))
    return [_shortest(found) for found in rounds]


def _shortest(rounds):
    calm = sorted(seconds for taken, seconds in rounds if not taken)
    if len(calm) > 1:
        return calm[0], calm[1] < _AGREE * calm[0]
    return min(seconds for _, seconds in rounds), False


def _taken():
    """How often another process has taken a core from this one."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


# ----------------------------------------------------------------------------------------------------- the same bits


def chosen() -> dict[str, str]:
    """{class: library} of all products so far, for a checkpoint: a resumed run multiplies as before."""
    pinned = _restored.get("every", PINNED)
    if pinned != "auto":
        return {"every": pinned}
    return _restored | {
        class_of(kind, sizes): "onednn" if is_onednn else "torch"
        for (kind, sizes, _), is_onednn in list(_known.items())
    }


@contextlib.contextmanager
def restored(choices: dict[str, str] | None) -> Iterator[None]:
    """Within it, products go to the libraries that `chosen` returned once; others are measured. None: all to oneDNN,
    as in checkpoints that say nothing. Raises ValueError for anything else."""
    choices = {"every": "onednn"} if choices is None else choices
    if not isinstance(choices, dict) or not set(map(str, choices.values())) <= {"onednn", "torch"}:
        raise ValueError(f"products are {choices!r}: expected {{class: 'onednn' or 'torch'}}")
    before = dict(_restored), dict(_known)
    _restored.clear(), _known.clear()
    _restored.update(choices)
    try:
        yield
    finally:
        for table, content in zip((_restored, _known), before):
            table.clear()
            table.update(content)


# ----------------------------------------------------------------------------------------------------------- the file


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name with the numbers that tell it from others: a virtual machine may call all "AMD EPYC"."""
    facts = _facts(cpuinfo)
    name = facts.get("model name") or platform.processor() or platform.machine()
    # x86 has the first two; Arm has the others, and often no name
    wanted = {"cpu family": "family", "model": "model", "cpu implementer": "implementer", "cpu part": "part"}
    numbers = ", ".join(f"{word} {facts[key]}" for key, word in wanted.items() if facts.get(key))
    return f"{name} ({numbers})" if numbers else name


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The processor's instructions that matrix libraries make use of, of those that Linux lists."""
    flags = set(_facts(cpuinfo).get("flags", "").split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return [name for name in known if name in flags]


def _facts(cpuinfo):
    """{what: value} of the first core."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return {name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in reversed(lines))}


def cache_directory() -> Path:
    """Where files that can be made again are kept, for all runs of this user."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        # a container's user may have no home
        cache = tempfile.gettempdir()
    return Path(cache) / "fastbert"


@functools.cache
def _file(threads):
    name = re.sub(r"[^a-z0-9.]+", "-", f"{processor()} {threads} threads torch {torch.__version__}".lower()).strip("-")
    return cache_directory() / "products" / f"{name}.json"


def _read(path):
    """{class: [seconds of oneDNN, seconds of torch]}; {} if there is no such file, or it holds something else."""
    try:
        times = json.loads(path.read_text(encoding="utf-8"))
        times = {str(name): (float(onednn), float(own)) for name, (onednn, own) in times.items()}
        return {name: both for name, both in times.items() if min(both) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path, times):
    # without the file, the next process measures again
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            building.write_text(json.dumps(times, indent=1, sort_keys=True), encoding="utf-8")
            building.replace(path)
        finally:
            building.unlink(missing_ok=True)


def table(candidates: Callable) -> list[tuple[str, float, float]]:
    """(class, GFLOP/s of oneDNN, GFLOP/s of torch) of a linear layer's products in BERT-base, measured or from the
    file."""
    rows, threads = [], torch.get_num_threads()
    for kind, (N, K), M in itertools.product(("forward", "gelu", "dx", "dweight"), ((768, 768), (3072, 768)), (6, 96)):
        sizes = {"dx": (M, N, K), "dweight": (N, M, K)}.get(kind, (M, K, N))
        times = _times(class_of(kind, sizes), threads, candidates)
        rows.append((class_of(kind, sizes), *(2 * M * N * K / seconds / 1e9 for seconds in times)))
    return rows
