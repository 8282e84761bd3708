"""The command `doctor`: what this machine offers and what fastbert uses, and what the compiler makes of the kernels."""

import datetime
import inspect
import json
import platform
import time
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import ops, reference
from ..cpu import libraries, low_precision, matmul
from ..training.card import versions
from . import offline
from .op_cases import OPS


def doctor():
    """Lines to print: versions, the machine, the GPU, Triton, and the implementation that each op uses."""
    lines = [f"{name} {number}" for name, number in versions().items()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines.append(f"machine: {platform.machine()}, {platform.system()}, {torch.get_num_threads()} threads")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        lines.append(f"GPU: {properties.name}, {properties.total_memory / 1e9:.0f} GB")
    else:
        lines.append("GPU: PyTorch finds none")
    lines.append(f"Triton: {'found' if ops.has_triton() else 'not installed'}")
    lines.append(f"launch settings: {_settings(device)}")
    lines.append(f"instructions: {' '.join(libraries.instructions()) or 'none known'}")
    lines.append(f"FASTBERT_IMPL: {ops.IMPL}")
    for name, op in vars(ops).items():
        if inspect.isfunction(op) and not name.startswith("_") and hasattr(reference, name):
            has_kernel = "impl" in inspect.signature(op).parameters
            lines.append(f"ops.{name}: {_implementation(device) if has_kernel else 'PyTorch'}")
    return lines + _products()


def _products():
    """Which library multiplies on this CPU, and how fast."""
    if not torch.backends.mkldnn.is_available():
        return ["matrix products: PyTorch has no oneDNN here"]
    lines = [
        f"matrix products (FASTBERT_MATMUL: {libraries.PINNED}), GFLOP/s by oneDNN and by PyTorch's own choice, and "
        "what auto takes:"
    ]
    for name, onednn, own in libraries.table(matmul.candidates):
        lines.append(f"  {name:<24} {onednn:6.0f} {own:6.0f}  {'onednn' if onednn > own else 'torch'}")
    lines.append(f"dtypes in inference, times as fast as fp32 (taken from {low_precision.WORTH} on):")
    lines += [f"  {dtype:<24} {low_precision.gain(dtype):6.2f}" for dtype in low_precision.DTYPES[1:]]
    return lines


_RUNS = {"triton": "Triton kernels", "cpu": "PyTorch and NumPy", "reference": "plain PyTorch"}


def _implementation(device):
    try:
        return _RUNS[ops.implementation(device)]
    except RuntimeError as error:
        return f"fails, {error}"


def _settings(device):
    if device.type != "cuda" or not ops.has_triton():
        return "not used, no kernel runs on this machine"
    from ..kernels import _launch

    file = _launch.PROFILES / f"{_launch.device_name()}.json"
    return f"measured on this device, {file}" if file.exists() else f"defaults, there is no {file.name}"


def doctor_compile(archs, dtypes, models, op_names, *, candidates=False, json_file=None):
    """Compile the kernels, print tables of what the compiler made of them, and return whether there is no problem.

    archs, dtypes, models, op_names, candidates: as in `offline.report`. Empty archs mean sm_80, empty dtypes bf16 and
    fp32, empty models and op_names all. json_file: a file for the rows. Raises ValueError as `offline.report` does, and
    OSError if the file cannot be written.
    """
    chosen = (("arch", archs), ("dtype", dtypes), ("model", models), ("op", op_names))
    command = ["fastbert", "doctor", "--compile", *(f"--{name}={x}" for name, found in chosen for x in found)]
    archs, dtypes = archs or ("sm_80",), dtypes or ("bf16", "fp32")
    models, op_names = models or tuple(offline.MODELS), op_names or tuple(OPS)
    offline.check(archs, dtypes, models, op_names)
    # opened first, so that a wrong path fails before minutes of compiling
    target = open(json_file, "w", encoding="utf-8") if json_file else None  # noqa: SIM115 (closed below)
    start = time.perf_counter()
    with _progress() as on_progress:
        rows = offline.report(archs, dtypes, models, op_names, candidates=candidates, on_progress=on_progress)
    seconds = time.perf_counter() - start
    if target:
        about = dict(
            date=datetime.date.today().isoformat(), command=" ".join(command + ["--candidates"] * candidates),
            versions=versions(), seconds=round(seconds, 1),
        )  # fmt: skip
        with target:
            json.dump({**about, "kernels": rows}, target, indent=1)
    # without a terminal rich would use 80 columns
    console = Console(width=max(Console().width, 100), highlight=False, markup=False)
    console.print(_LEGEND + "; ".join(f"{_LETTERS[model]} {model}" for model in models))
    for arch in archs:
        for dtype in dtypes:
            chosen = [row for row in rows if (row["arch"], row["dtype"]) == (arch, dtype) and "error" not in row]
            if chosen:
                console.print(f"\n{arch} {dtype}", style="bold")
                _print_table(console, chosen, models)
    for kind, style in (("remark", "yellow"), ("problem", "red")):
        # {sentence: {kernel: where it is used}}
        said = {}
        for row in rows:
            for sentence in row[kind + "s"]:
                said.setdefault(sentence, {}).setdefault(_name(row), []).extend(row["uses"])
        for sentence, names in said.items():
            where = "; ".join(f"{name} ({_used(uses)})" for name, uses in names.items())
            console.print(f"{kind}: {sentence}: {where}", style=style)
    bad = sum(bool(row["problems"]) for row in rows)
    verdict = f"{bad} with problems" if bad else "no problem"
    console.print(f"{len(rows)} compiled kernels in {seconds:.0f} s: {verdict}")
    return not bad


_LEGEND = """\
for: models and case; ? marks a setting that only autotuning tries. w: warps. reg: registers per thread; ! marks spills.
KiB: shared memory per program. per SM: programs per multiprocessor, and what limits them. 16 B: share of the bytes that
move in 16-byte accesses. The other columns count instructions of the busiest loop, or of the whole kernel (*). bound:
the busiest unit if nothing waits. Models: """.replace("\n", " ")
_LETTERS = {"bert-base": "B", "bert-large": "L", "minilm": "M", "deberta-base": "D", "mpnet-base": "P"}
# width and name; the first two columns are aligned left
_COLUMNS = (
    (12, "kernel"), (19, "for"), (2, "w"), (5, "reg"), (4, "KiB"), (8, "per SM"), (5, "16 B"), (6, "slots"), (4, "ten"),
    (5, "mufu"), (6, "fp32"), (5, "int"), (5, "shm"), (4, "glb"), (4, "syn"), (7, "bound"),
)  # fmt: skip


def _print_table(console, rows, models):
    # models with equal figures share a line
    lines = {}
    for row in rows:
        lines.setdefault((row["op"], bool(row["problems"]), _cells(row)), set()).update(u["model"] for u in row["uses"])
    console.print(_line([name for _, name in _COLUMNS]), style="dim")
    op = None
    for (name, is_bad, (kernel, case, *cells)), users in lines.items():
        if name != op:
            console.print(op := name, style="bold")
        letters = "".join(_LETTERS[model] if model in users else "-" for model in models)
        console.print(_line([kernel, f"{letters} {case}", *cells]), style="red" if is_bad else None, soft_wrap=True)


def _line(cells):
    # a space before each column keeps numbers apart that are wider than their column
    texts = [
        cell[: width - 1].ljust(width - 1) if i < 2 else cell.rjust(width - 1)
        for i, ((width, _), cell) in enumerate(zip(_COLUMNS, cells))
    ]
    return " ".join(texts)


def _cells(row):
    loop, occupancy, cycles = row["loop"], row["occupancy"], row["cycles"]
    counts = [loop[kind] for kind in ("tensor", "mufu", "fp32", "int", "shared", "global", "sync")]
    limit = {"registers": "reg", "shared": "shm", "warps": "warp", "programs": "prog"}[occupancy["limit"]]
    return (
        _short_name(row),
        ("? " if row["is_candidate"] else "") + ", ".join(dict.fromkeys(use["case"] for use in row["uses"])),
        str(row["settings"]["warps"]),
        f"{row['registers']}{'!' if row['stack'] or row['spills'] else ''}",
        f"{row['shared'] / 1024:.0f}",
        f"{occupancy['programs']} {limit}",
        f"{row['wide_share']:.0%}",
        f"{loop['slots']}{'*' if loop['whole'] else ''}",
        *(str(number) if number else "" for number in counts),
        max(cycles, key=cycles.get) if cycles else "",
    )


def _short_name(row):
    # without the op's name, which is printed above; an op may launch kernels of another op
    name = row["kernel"].strip("_").removesuffix("_kernel")
    return min((name.removeprefix(op + "_") for op in OPS), key=len)


def _name(row):
    settings = ""
    if row["is_candidate"]:
        # sizes only, no flags, nothing that is not set
        settings = " ".join(f"{name}={value}" for name, value in row["settings"].items() if type(value) is int)
    return " ".join(filter(None, (row["arch"], row["dtype"], row["op"], _short_name(row), settings)))


def _used(uses):
    return ": ".join(", ".join(dict.fromkeys(use[key] for use in uses)) for key in ("model", "case"))


@contextmanager
def _progress():
    columns = TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
