"""A map on threads."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor


def ordered_map(function, items, threads, *, size=lambda item: 1, ahead=None):
    """map(function, items), in order, on `threads` threads; 0 maps here.

    The threads read items ahead of what was taken, of the sum of sizes `ahead` in all, by default two for each thread.
    """
    if threads == 0:
        yield from map(function, items)
        return
    ahead = 2 * threads if ahead is None else ahead
    pool = ThreadPoolExecutor(threads)
    try:
        waiting, total = deque(), 0
        for item in items:
            waiting.append((size(item), pool.submit(function, item)))
            total += size(item)
            while total > ahead:
                taken, future = waiting.popleft()
                total -= taken
                yield future.result()
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
