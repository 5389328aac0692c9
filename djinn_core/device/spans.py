"""Free spans of a line of bytes: first fit, neighbours joined again. Not thread-safe; its owner locks.

One list serves the emulated device's file, the host tier's slabs and the disk tier's file.
"""

from __future__ import annotations

from bisect import bisect_left, insort


class FreeSpans:
    """What is free of `size_bytes`, in units of `granularity_bytes`."""

    def __init__(self, size_bytes: int, granularity_bytes: int) -> None:
        self.granularity_bytes = granularity_bytes
        self.size_bytes = size_bytes // granularity_bytes * granularity_bytes
        self.free_bytes = self.size_bytes
        self._spans: list[tuple[int, int]] = [(0, self.size_bytes)] if self.size_bytes else []  # (start, end), sorted

    def rounded(self, size_bytes: int) -> int:
        """`size_bytes` up to the granularity, at least one unit."""
        return max(1, -(-size_bytes // self.granularity_bytes)) * self.granularity_bytes

    def take(self, size_bytes: int) -> int | None:
        """The start of the first free span that holds `size_bytes` (rounded up), or None."""
        size_bytes = self.rounded(size_bytes)
        if size_bytes > self.free_bytes:
            return None
        for i, (start, end) in enumerate(self._spans):
            if end - start >= size_bytes:
                if end - start == size_bytes:
                    del self._spans[i]
                else:
                    self._spans[i] = (start + size_bytes, end)
                self.free_bytes -= size_bytes
                return start
        return None

    def take_scattered(self, size_bytes: int) -> list[tuple[int, int]] | None:
        """`size_bytes` as (start, size) pieces, one if any span holds it; None only if less is free in all."""
        size_bytes = self.rounded(size_bytes)
        if size_bytes > self.free_bytes:
            return None
        start = self.take(size_bytes)
        if start is not None:
            return [(start, size_bytes)]
        pieces, missing = [], size_bytes
        while missing:
            start, end = self._spans[0]
            taken = min(missing, end - start)
            pieces.append((start, taken))
            if taken == end - start:
                del self._spans[0]
            else:
                self._spans[0] = (start + taken, end)
            missing -= taken
        self.free_bytes -= size_bytes
        return pieces

    def give(self, start: int, size_bytes: int) -> None:
        """Make a taken span free again; ValueError if part of it is free already."""
        end = start + self.rounded(size_bytes)
        i = bisect_left(self._spans, (start, end))
        before = self._spans[i - 1] if i else None
        after = self._spans[i] if i < len(self._spans) else None
        if start < 0 or end > self.size_bytes or (before and before[1] > start) or (after and after[0] < end):
            raise ValueError(f"span {start:#x}..{end:#x} is not taken")
        self.free_bytes += end - start
        if before and before[1] == start:
            start = before[0]
            self._spans.remove(before)
        if after and after[0] == end:
            end = after[1]
            self._spans.remove(after)
        insort(self._spans, (start, end))

    @property
    def largest_bytes(self) -> int:
        """The longest free span."""
        return max((end - start for start, end in self._spans), default=0)

    @property
    def empty(self) -> bool:
        """Nothing is taken."""
        return self.free_bytes == self.size_bytes
