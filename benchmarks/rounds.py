"""Calls that take turns: warmed up, in alternating order, until their times say something."""

import math
import statistics
import time

import torch

# the spread, of the median, above which a row gets more rounds; new pages in a round that is still warming up
WIDE, NEW_PAGES = 0.1, 1000


def quartiles(seconds):
    """(lower, upper); of a single round that round."""
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


def spread(seconds):
    """Half of the distance between the quartiles, as a share of the median: the ± of every table."""
    low, high = quartiles(seconds)
    return (high - low) / (2 * statistics.median(seconds))


def interval_of_median(values):
    """(lower, upper) of a 95 % interval of the median, whatever the distribution: two of the values in order, of nine
    the second and the eighth. Of fewer than six values no two are far enough apart: the smallest and the largest."""
    values, n = sorted(values), len(values)
    out = 0
    # that the median lies below the value after next is as likely as so many heads, or fewer, of n coins
    while out + 1 < n / 2 and 2 * sum(math.comb(n, i) for i in range(out + 2)) <= 0.05 * 2**n:
        out += 1
    return values[out], values[n - 1 - out]


def take_turns(calls, rounds, seconds=20.0, device=None, prepare=lambda name: None, on_failure=None):
    """{name: seconds of each call} of functions without arguments, which have been called before.

    rounds: (least, most). The least, and more while a round takes little (a second in all) or while the spread of any
    is above WIDE. Three are timed however long they take; no other begins once `seconds` are over. On a CPU a round in
    which calls take memory from the kernel is one of warming up, and does not count: three at most, in half the time.
    prepare: called with the name before each call, outside of its time. on_failure: called with the name and the
    exception of a call that fails, which then takes no more turns and is not in the result; without it, it is raised.
    """
    least, most = rounds
    on_gpu = device is not None and device.type == "cuda"
    times, began = {name: [] for name in calls}, time.perf_counter()

    def turn(names):
        for name in list(names):
            try:
                prepare(name)
                if on_gpu:
                    torch.cuda.synchronize(device)
                start = time.perf_counter()
                calls[name]()
                if on_gpu:
                    torch.cuda.synchronize(device)
                times[name].append(time.perf_counter() - start)
            except Exception as failure:
                if on_failure is None:
                    raise
                on_failure(name, failure)
                names.remove(name)
                del times[name]

    def is_enough():
        done, elapsed = len(next(iter(times.values()))), time.perf_counter() - began
        if done < min(3, least):
            return False
        if elapsed > seconds or done >= most:
            return True
        settled = all(spread(found) <= WIDE for found in times.values())
        return done >= least and settled and elapsed > 1

    names, may_warm_up = list(calls), 3 if least > 2 and not on_gpu else 0
    while not is_enough():
        before = pages_taken()
        turn(names)
        names.reverse()
        if may_warm_up and pages_taken() - before >= NEW_PAGES and time.perf_counter() - began < seconds / 2:
            may_warm_up -= 1
            for found in times.values():
                found.pop()
    return times


def pages_taken():
    """How many pages of memory this process has taken so far; 0 where nothing counts them."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
