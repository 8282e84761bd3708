"""The device that a benchmark runs on: its name, its versions, its ceilings, and a clock for it.

python benchmarks/machine.py          writes machine.json to benchmarks/results/<device>
"""

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastbert import ops
from fastbert.cpu.libraries import PINNED, instructions, processor
from fastbert.training.card import versions

# sizes by the device's type: elements of a copy, many times any cache; the side of a product that keeps every
# multiprocessor or core busy; fp32 numbers that are read to empty the caches, twice an MI300X's, the largest
COPIED = {"cuda": 2**31, "cpu": 2**27}
SIDE = {"cuda": 8192, "cpu": 2048}
COLD = {"cuda": 2**27, "cpu": 2**24}


def device(name="auto"):
    """The torch.device that a benchmark runs on. Raises ValueError where there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda: PyTorch finds no GPU here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def rehearsing(device):
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 FASTBERT_IMPL=triton): no time means anything."""
    return device.type != "cuda" and ops.uses_triton(device)


def folder(device):
    """Where results of this device belong; those of a rehearsal are not kept."""
    results = Path(__file__).resolve().parent / "results"
    if device.type != "cuda":
        return results / ("rehearsal" if rehearsing(device) else cpu_folder(processor(), os.cpu_count()))
    from fastbert.kernels._launch import device_name

    return results / device_name()


def cpu_folder(processor, cores):
    """The name of the folder for results of a processor: cpu-amd-epyc-family-25-model-1-2-cores."""
    # leave out what adds nothing: "Intel(R) Xeon(R) CPU @ 2.20GHz", "AMD EPYC 9B45 128-Core Processor"
    said = re.sub(r"\((r|tm)\)|@.*?hz|\d+-core|\bcpu\b|\bprocessor\b", " ", processor.lower())
    return "-".join(["cpu", *re.findall(r"[a-z0-9]+", said), str(cores), "core" if cores == 1 else "cores"])


def parser(doc):
    """The parser of a benchmark's options, of which --output is one; its description is the docstring's first line."""
    found = argparse.ArgumentParser(description=doc.partition("\n")[0])
    found.add_argument("--output", type=Path, help="default: benchmarks/results/<device>")
    return found


def describe(device):
    """{what: ...} of the device and the software, to stand beside every result."""
    facts = {"device": processor(), **versions()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name, "memory_gib": round(properties.total_memory / 2**30),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or f"hip {torch.version.hip}", "driver": _driver(),
        }  # fmt: skip
    else:
        # a busy machine's figures are worth less
        load = round(os.getloadavg()[0], 2)
        facts |= {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_average": load}
        facts |= {"instructions": instructions(), "FASTBERT_MATMUL": PINNED}
    # switches that change what compiled peers are
    switches = {name: value for name, value in sorted(os.environ.items()) if name.startswith("TORCHINDUCTOR_MAX")}
    if switches:
        facts["environment"] = switches
    if rehearsing(device):
        facts["rehearsal"] = "Triton's interpreter, tiny shapes: no time here means anything"
    return facts


def memory(device):
    """Bytes of a GPU's total memory. Sizes go by it, not by free memory, which depends on what else runs."""
    return torch.cuda.get_device_properties(device).total_memory


def _driver():
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip().partition("\n")[0]


def ceilings(device):
    """{"copy": bytes a second, read and written; "product": FLOPs a second of a matrix product}, both measured.

    The product is in bf16 on a GPU; on a CPU in fp32, and of torch's two libraries by the faster.
    """
    clock = Clock(device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return {"copy": _copy_rate(clock), "product": product_rate(clock, dtype)}


def _copy_rate(clock):
    elements = 2**20 if rehearsing(clock.device) else COPIED[clock.device.type]
    if clock.device.type == "cuda":
        elements = min(elements, memory(clock.device) // 8)
    source, target = (torch.empty(elements, dtype=torch.bfloat16, device=clock.device) for _ in range(2))
    source.normal_()
    return 2 * source.nbytes / _median_seconds(clock, lambda: target.copy_(source))


def product_rate(clock, dtype):
    """FLOPs a second of a large matrix product in a dtype, by its name."""
    side = 256 if rehearsing(clock.device) else SIDE[clock.device.type]
    # random numbers: a product of zeros draws less power, and runs faster
    a, b = (torch.randn(side, side, device=clock.device).to(getattr(torch, dtype)) for _ in range(2))
    calls = [lambda: a @ b]
    if clock.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # oneDNN, which torch contains and chooses for some dtypes and processors only
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return 2 * side**3 / min(_median_seconds(clock, call) for call in calls)


def _median_seconds(clock, call, rounds=10):
    return statistics.median([clock.seconds(call)[0] for _ in range(rounds + 3)][3:])


class Clock:
    """Times calls on a device, each from a cold cache; on a GPU without the time of the host. README.md says how."""

    def __init__(self, device):
        self.device = device
        # ones: pages that were never written may not exist
        self.cold = torch.ones(1 if rehearsing(device) else COLD[device.type], device=device)
        # whether the last calls waited for the host: then their time is not the device's alone
        self.was_late = False
        self.cache = 2**25
        if device.type == "cuda":
            self.cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
            self.cycles_per_second = _cycles_per_second()
            # {sequence of calls: seconds for which the device is kept busy while they are queued}
            self.waits = {}

    def seconds(self, *calls):
        """Seconds of each call, one after the other, each from a cold cache. A call gets what the one before returned.

        Calls may be repeated: they must leave what they are given as it was.
        """
        if self.device.type != "cuda":
            return self._on_the_host(calls)
        wait = self.waits.pop(id(calls[0]), 5e-4)
        for _ in range(3):
            taken, queued = self._on_the_stream(calls, wait)
            wait = min(max(2 * queued, 2e-4), 2e-2)
            if not self.was_late:
                self.waits[id(calls[0])] = wait
                break
        return taken

    def _on_the_stream(self, calls, wait):
        """(seconds of each call, how long the host took to queue them)."""
        # keeps the device busy until the host has queued everything
        torch.cuda._sleep(int(wait * self.cycles_per_second))
        start = time.perf_counter()
        spans, result = [], ()
        for call in calls:
            self.cold.sum()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = (call(*result),)
            end.record()
            spans.append((begin, end))
        queued = time.perf_counter() - start
        # the device has got to the first call before the last was queued: it may have waited in between
        self.was_late = spans[0][0].query()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1000 for begin, end in spans], queued

    def _on_the_host(self, calls):
        seconds, result = [], ()
        for call in calls:
            self.cold.sum()
            start = time.perf_counter()
            result = (call(*result),)
            seconds.append(time.perf_counter() - start)
        return seconds

    def copies(self, nbytes):
        """How many copies of arguments of so many bytes to use in turn: two, up to four of what a cache could hold."""
        copies = min(max(-(-2 * self.cache // max(nbytes, 1)), 2), 4)
        if self.device.type == "cuda" and copies * nbytes > memory(self.device) // 8:
            return 1
        return copies


def _cycles_per_second():
    """The rate of the clock that torch.cuda._sleep counts: the highest of three, as the first wakes the device."""
    rates = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(10**6)
        end.record()
        torch.cuda.synchronize()
        rates.append(10**6 / (begin.elapsed_time(end) / 1000))
    return max(rates)


def gib_per_call(device, call):
    """GiB that a call takes at its highest, beyond what was there, by torch's allocator; None in a rehearsal."""
    if rehearsing(device):
        return None
    if device.type != "cuda":
        return _gib_on_a_cpu(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def _gib_on_a_cpu(call):
    """Without what libraries take beside the allocator, such as oneDNN's own buffers."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler would tell of its own steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0)) / 2**30


def kernel_times(call):
    """[{"kernel", "calls", "us"}] of what a call runs on the device, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = [event for event in profile.key_averages() if event.self_device_time_total]
    found.sort(key=lambda event: -event.self_device_time_total)
    return [
        {"kernel": event.key[:120], "calls": event.count, "us": round(event.self_device_time_total, 1)}
        for event in found[:60]
    ]


def main():
    options = parser(__doc__).parse_args()
    here = device()
    output = options.output or folder(here)
    facts, rates = describe(here), ceilings(here)
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"copy: {rates['copy'] / 1e12:.3f} TB/s read and written")
    print(f"matrix product, {'bf16' if here.type == 'cuda' else 'fp32'}: {rates['product'] / 1e12:.2f} TFLOP/s")
    output.mkdir(parents=True, exist_ok=True)
    (output / "machine.json").write_text(json.dumps({**facts, "ceilings": rates}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
