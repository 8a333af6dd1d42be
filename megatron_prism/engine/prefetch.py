"""Work done ahead of the need: items made in order by one background thread, a bounded number of them at a time.

Knows nothing of tokens. An item's error is raised where the item is asked for, as it was; asking out of order starts again from there.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """`make(place)` for place, place + stride, ... while the caller works on earlier ones.

    depth: items that exist or are being made at once. on_start: called once in the thread, before anything is made there. The thread rests while
    `depth` items wait. It ends with `close`, after the item that it is making; without one with the process, after all that were asked for.
    """

    def __init__(self, make: Callable[[int], Item], stride: int, depth: int, on_start: Callable[[], None] | None = None) -> None:
        assert stride > 0 and depth > 0, (stride, depth)
        self._make, self._stride, self._depth = make, stride, depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prism-prefetch", initializer=on_start)
        self._coming: deque[Future[Item]] = deque()
        self._first = 0
        self.waited_seconds = 0.0
        """how long callers of `get` stood still, in all"""

    def get(self, place: int) -> Item:
        """The item of a place; the next of its kind are made from now on. Errors: those of `make(place)`."""
        if place != self._first:
            self._drop()
            self._first = place
        while len(self._coming) < self._depth:
            self._coming.append(self._thread.submit(self._make, self._first + len(self._coming) * self._stride))
        self._first += self._stride
        item = self._coming.popleft()
        begun = time.perf_counter()
        try:
            return item.result()
        finally:
            self.waited_seconds += time.perf_counter() - begun

    def close(self) -> None:
        """Forget what is not asked for yet, and end the thread."""
        self._drop()
        self._thread.shutdown(wait=True)

    def _drop(self) -> None:
        for item in self._coming:
            item.cancel()
        self._coming.clear()
