"""How calls are timed, on a CPU and on a pretended GPU: cold caches, a device that never waits, arguments that move."""

import bench_ops
import machine
import op_peers
import pretend_cuda
import pytest
import torch
from pretend_cuda import GIB, Stream, pretending, small

from fastbert.proof.op_cases import Case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Time:
    """A host's time that passes when it is looked at, a little, and when the host sleeps."""

    now = 0.0

    def perf_counter(self):
        self.now += 1e-7
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    monotonic = perf_counter


@pytest.fixture
def time(monkeypatch):
    found = Time()
    for module in (machine, pretend_cuda):
        monkeypatch.setattr(module, "time", found)
    monkeypatch.setattr(Stream, "until", 0.0)
    return found


@pytest.fixture
def clock(time):
    """A Clock of a pretended GPU."""
    with pretending(), small():
        yield machine.Clock(CUDA)


class Cold:
    """Stands in for what is read between calls, and notes when."""

    def __init__(self, log):
        self.log = log

    def sum(self):
        self.log.append("cold")


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_every_pass_begins_with_a_cold_cache(device, time):
    with pretending(), small():
        clock, log = machine.Clock(device), []
        clock.cold = Cold(log)
        taken = clock.seconds(lambda: log.append("forward") or 7, lambda given: log.append(("backward", given)))
    assert log == ["cold", "forward", "cold", ("backward", 7)]
    assert len(taken) == 2 and all(seconds > 0 for seconds in taken)


def test_what_empties_the_caches_is_larger_than_they_are():
    """Of an H200 (50 MiB), a B200 (126 MiB) and an MI300X (256 MiB), in fp32; and memory that was written exists."""
    assert 4 * machine.COLD["cuda"] >= 2 * 256 * 2**20 and 4 * machine.COLD["cpu"] >= 2 * 2**25
    assert machine.Clock(CPU).cold.sum() == machine.COLD["cpu"]


def test_a_slow_host_is_not_in_the_time(clock, time):
    """Its first wait is too short: it measures again behind a longer one, and remembers that."""

    def slow():
        time.sleep(0.004)

    (taken,) = clock.seconds(slow)
    assert taken < 1e-4 and not clock.was_late
    waits = [cycles for what, *cycles in Stream.log if what == "sleep"]
    Stream.log.clear()
    clock.seconds(slow)
    (again,) = [cycles for what, *cycles in Stream.log if what == "sleep"]
    # 1e9 cycles a second, and twice what queueing took
    assert again[0] > 7e6 > waits[-2][0]


def test_what_waits_for_the_device_is_told(clock):
    clock.seconds(torch.cuda.synchronize)
    assert clock.was_late and not clock.waits
    clock.seconds(lambda: None)
    assert not clock.was_late


def test_the_rate_of_the_clock_that_sleeps_is_measured(clock):
    assert clock.cycles_per_second == pytest.approx(1e9, rel=0.1)


@pytest.mark.parametrize(("nbytes", "gib", "copies"), [(1, 140, 4), (2**25, 140, 4), (2**26, 140, 2), (2**30, 140, 2)])
def test_copies_are_what_a_cache_could_hold(nbytes, gib, copies):
    with pretending(gib), small():
        assert machine.Clock(CUDA).copies(nbytes) == copies


def test_no_copies_where_memory_is_short():
    with pretending(15), small():
        assert machine.Clock(CUDA).copies(GIB) == 1


def test_no_call_finds_the_places_of_the_last():
    arguments = Case("layer_norm", "tiny", (3, 8), torch.float32).arguments(CPU)
    run = op_peers.build(op_peers.variants("layer_norm")["eager"], arguments)
    forward, places = run.forward, []

    def noted():
        places.append([x.data_ptr() for x in run.leaves])
        return forward()

    run.forward = noted
    bench_ops.in_turns({"eager": run}, machine.Clock(CPU), 5, 1e9, {})
    # the first call is the cotangent's
    timed = places[1:]
    assert len(timed) == 6 and all(set(a).isdisjoint(b) for a, b in zip(timed, timed[1:]))
