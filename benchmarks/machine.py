"""The device that a benchmark runs on: its name, its versions, its ceilings, and a clock for it.

python benchmarks/machine.py          writes machine.json to benchmarks/results/<device>
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastbert.report import versions


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def folder(device):
    """Where results of this device belong; those of a rehearsal, without a GPU, are not kept."""
    results = Path(__file__).resolve().parent / "results"
    if device.type != "cuda":
        return results / "rehearsal"
    from fastbert.kernels._launch import device_name

    return results / device_name()


def describe(device):
    """{what: ...} of the device and the software, to stand beside every result."""
    facts = {"device": platform.processor() or platform.machine(), **versions()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["memory_gib"] = round(properties.total_memory / 2**30)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
        facts["driver"] = _driver()
    else:
        facts["rehearsal"] = "Triton's interpreter, tiny shapes: no time here means anything"
    return facts


def _driver():
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip().partition("\n")[0]


def ceilings(device):
    """{"copy": bytes a second, read and written; "product": FLOPs a second of a bf16 matrix product}, both measured."""
    clock = Clock(device)
    return {"copy": _copy_rate(clock), "product": _product_rate(clock)}


def _copy_rate(clock):
    elements = 2**20
    if clock.device.type == "cuda":
        # many times any cache, and what fits
        elements = min(2**31, torch.cuda.mem_get_info(clock.device)[0] // 8)
    source, target = (torch.empty(elements, dtype=torch.bfloat16, device=clock.device) for _ in range(2))
    source.normal_()
    return 2 * source.nbytes / _median_seconds(clock, lambda: target.copy_(source))


def _product_rate(clock):
    # large enough to keep every multiprocessor busy
    side = 8192 if clock.device.type == "cuda" else 256
    # random numbers: a product of zeros draws less power, and runs faster
    a, b = (torch.randn(side, side, device=clock.device).to(torch.bfloat16) for _ in range(2))
    return 2 * side**3 / _median_seconds(clock, lambda: a @ b)


def _median_seconds(clock, call, rounds=10):
    return statistics.median([clock.seconds(call)[0] for _ in range(rounds + 3)][3:])


class Clock:
    """Times calls on a device: on a GPU what its stream takes, without the time of the host that feeds it."""

    def __init__(self, device):
        self.device = device
        if device.type == "cuda":
            # more than the cache between processor and memory holds
            self.cold = torch.empty(2**26, dtype=torch.int32, device=device)
            # how long a sequence of calls takes to be queued, in cycles of the device
            self.cycles = {}

    def seconds(self, *calls):
        """Seconds of each call, one after the other, from a cold cache. A call gets what the one before it returned."""
        if self.device.type != "cuda":
            return self._on_the_host(calls)
        self.cold.zero_()
        # keeps the device busy until the host has queued everything
        torch.cuda._sleep(self.cycles.get(id(calls[0]), 10**6))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        start = time.perf_counter()
        events[0].record()
        result = ()
        for call, event in zip(calls, events[1:]):
            result = (call(*result),)
            event.record()
        queued = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        # at most 20 ms: a call that waits for the device waits for this too. 2e9: cycles a second, no GPU has more
        self.cycles[id(calls[0])] = int(min(max(2 * queued, 2e-4), 2e-2) * 2e9)
        return [a.elapsed_time(b) / 1000 for a, b in zip(events, events[1:])]

    def _on_the_host(self, calls):
        seconds, result = [], ()
        for call in calls:
            start = time.perf_counter()
            result = (call(*result),)
            seconds.append(time.perf_counter() - start)
        return seconds


def gib_per_call(device, call):
    """GiB of GPU memory that a call takes at its highest, beyond what was there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>")
    options = parser.parse_args()
    here = device()
    output = options.output or folder(here)
    facts, rates = describe(here), ceilings(here)
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"copy: {rates['copy'] / 1e12:.3f} TB/s read and written")
    print(f"bf16 matrix product: {rates['product'] / 1e12:.1f} TFLOP/s")
    output.mkdir(parents=True, exist_ok=True)
    (output / "machine.json").write_text(json.dumps({**facts, "ceilings": rates}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
