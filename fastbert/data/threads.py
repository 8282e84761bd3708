"""A map on threads."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor


def ordered_map(function, items, threads):
    """map(function, items), in order, on `threads` threads that read a few items ahead; 0 reads none ahead."""
    if threads == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
