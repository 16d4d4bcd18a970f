"""Loading the next batch while the current one is computed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls fetch(first), fetch(first + 1), ... in one background thread, a few ahead of `get`."""

    last_wait_s: float
    """Seconds that the latest `get` had to wait."""

    def __init__(self, fetch: Callable[[int], T], first: int, count: int, depth: int = 2) -> None:
        """Starts loading positions first .. first + count - 1. depth: results held ready."""
        self._fetch = fetch
        self._positions = iter(range(first, first + count))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ready: deque[Future[T]] = deque()
        self.last_wait_s = 0.0
        for _ in range(depth):
            self._submit()

    def get(self) -> T:
        """Returns the next result in order.

        Raises StopIteration after the last, and whatever `fetch` raised for this position.
        """
        if not self._ready:
            raise StopIteration
        started = time.perf_counter()
        result = self._ready.popleft().result()
        self.last_wait_s = time.perf_counter() - started
        self._submit()
        return result

    def close(self) -> None:
        """Stops loading; a fetch that runs is waited for."""
        self._ready.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        for position in self._positions:
            self._ready.append(self._pool.submit(self._fetch, position))
            return

    def __iter__(self) -> Prefetcher[T]:
        return self

    __next__ = get

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
