"""What every system of the pressure experiment does: the same sessions, the same order, the same tokens.

Each session prefills its own prompt to the end and stops after layer L of its next token, so that its whole KV cache
is live. Then all take turns in a seeded random order: resume, a few tokens, stop in the next one again, pause. A
turn's tokens are compared with a stock model that never paused.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from djinn_core.turn import Turn
from workflow.scripts.resume_methods.base import Bench


@dataclass(frozen=True)
class Workload:
    """The demand. Prompts depend on the session's number only, orders on the seed and the round."""

    sessions: int
    prompt_tokens: int
    turn_tokens: int
    rounds: int
    layer: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Workload:
        return cls(**{name: config[name] for name in ("sessions", "prompt_tokens", "turn_tokens", "rounds", "layer")})

    @property
    def max_length(self) -> int:
        """The longest a session gets: the prompt, one token, its turns, and the token that it stops in."""
        return self.prompt_tokens + self.turn_tokens * (self.rounds + 1) + 2

    def prompt(self, session: int, model: PreTrainedModel) -> torch.Tensor:
        """Token ids [1, prompt_tokens], where the model is."""
        generator = torch.Generator().manual_seed(10_000 + session)
        ids = torch.randint(0, model.config.vocab_size, (1, self.prompt_tokens), generator=generator)
        return ids.to(model.device)

    def order(self, seed: int, round_index: int) -> list[int]:
        """Who takes a turn after whom."""
        generator = torch.Generator().manual_seed(1_000 * seed + round_index)
        return torch.randperm(self.sessions, generator=generator).tolist()

    def kv_bytes(self, config: Any, dtype: torch.dtype) -> int:
        """KV bytes of one session as it pauses for the first time, its prompt prefilled."""
        return (
            self.prompt_tokens
            * 2
            * config.num_hidden_layers
            * config.num_key_value_heads
            * config.head_dim
            * (dtype.itemsize)
        )


@dataclass
class TurnTimes:
    """One turn, from the call of resume: when layer L+1 could start, and when the next logits were there.

    `begun_ms`: when the caller's thread went on to the pass, with all issued that layer L+1 waits for, unless others
    had to make room first; None where nobody knows. `spans` says what that thread did until then, milliseconds each.
    `issue_ms`, `token_ms`: of the whole passes behind, in the mean, from the call that issues one to its return and to
    its token on the host; the device is waited for only where the second is the longer one.
    """

    ready_ms: float
    next_token_ms: float
    begun_ms: float | None = None
    spans: dict[str, float] = field(default_factory=dict)
    issue_ms: float | None = None
    token_ms: float | None = None


class Tenant(ABC):
    """One session in one system. `tokens` holds what it has said so far, to compare."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens: list[int] = []

    @abstractmethod
    def spawn(self, prompt: torch.Tensor) -> None:
        """Prefill, choose the first token, stop after layer L of its pass, pause."""

    @abstractmethod
    def turn(self) -> TurnTimes:
        """Resume, `turn_tokens` tokens, stop in the next one, pause."""

    @abstractmethod
    def close(self) -> None:
        """Give up what the session holds."""


def reference_tokens(model: PreTrainedModel, workload: Workload, session: int) -> list[int]:
    """What an unpaused stock model says to a session's prompt, with its stock cache.

    Not by `generate`: it takes a token of the prompt for padding, and never chooses the end of the text.
    """
    ids, cache, tokens = workload.prompt(session, model), None, []
    for _ in range(1 + workload.turn_tokens * workload.rounds):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values
        tokens.append(int(ids))
    return tokens


class Callers:
    """Threads that take turns, `count` of them, until its `with` block ends: as long as the experiment lasts.

    With `cores` they keep to so many neighbouring ones, the last of this process's. By turns they touch the same
    objects, the model's; far apart, each waits for the other's cache lines in every layer.

    Raises:
        ValueError: this process may not use so many cores.
    """

    def __init__(self, count: int, cores: int | None = None) -> None:
        if cores is not None and cores > (there := len(os.sched_getaffinity(0))):
            raise ValueError(f"callers are to keep to {cores} cores, and this process may use {there}")
        self._count = count
        self._pool = ThreadPoolExecutor(count, initializer=_keep_to, initargs=(cores,))
        self.together(lambda: None)  # they are there from here on

    def together(self, work: Callable[[], None]) -> float:
        """Run `work` in each of them until all have ended; returns the seconds of processor that it took."""
        begin = threading.Barrier(self._count)

        def call() -> float:
            begin.wait()
            begin_s = time.thread_time()
            work()
            return time.thread_time() - begin_s

        calls = [self._pool.submit(call) for _ in range(self._count)]
        wait(calls)  # one that failed must not leave the others at work
        return sum(each.result() for each in calls)

    def share(self, items: Iterable[int], work: Callable[[int], None], *, alone: bool = False) -> float:
        """Call `work` for each of `items`, which are given out in order; returns what `together` does.

        Where one fails, or is interrupted, no more are given out.

        Args:
            alone: one at a time, the callers by turns. So they open sessions, as a server's threads do: one that slept
                meanwhile would begin its turns with cold caches, on a core that has slept too.
        """
        turn, pending = Turn(), iter(items)

        def take() -> int | None:
            with turn:
                return next(pending, None)

        def stop() -> None:
            nonlocal pending
            pending = iter(())

        return self._serve(take, work, stop, turn if alone else nullcontext())

    def when_due(self, due: list[tuple[float, int]], work: Callable[[int], float | None]) -> float:
        """Call `work` for each (time, number) in `due` when its time has come; returns what `together` does.

        Times are of `time.monotonic`. What `work` returns is in how many seconds that number is due again, if it is.
        Where one fails, or is interrupted, nobody else begins.
        """
        changed, busy, stopped = threading.Condition(), 0, False
        heapq.heapify(due)

        def stop() -> None:
            nonlocal stopped
            with changed:
                stopped = True
                changed.notify_all()

        def take() -> int | None:
            nonlocal busy
            with changed:
                while not stopped and (due or busy):
                    left_s = due[0][0] - time.monotonic() if due else None
                    if left_s is not None and left_s <= 0:
                        busy += 1
                        return heapq.heappop(due)[1]
                    changed.wait(left_s)
            return None

        def serve(number: int) -> None:
            nonlocal busy
            again_s = None
            try:
                again_s = work(number)
            finally:
                with changed:
                    busy -= 1
                    if again_s is not None:
                        heapq.heappush(due, (time.monotonic() + again_s, number))
                    changed.notify_all()

        return self._serve(take, serve, stop, nullcontext())

    def _serve(
        self,
        take: Callable[[], int | None],
        work: Callable[[int], None],
        stop: Callable[[], None],
        around: AbstractContextManager,
    ) -> float:
        """In each of them `work` for what it takes, both within `around`, until that is None; `stop` if one fails."""

        def call() -> None:
            with torch.inference_mode():
                while True:
                    with around:
                        if (item := take()) is None:
                            return
                        try:
                            work(item)
                        except BaseException:
                            stop()
                            raise

        try:
            return self.together(call)
        except BaseException:
            stop()
            raise

    def __enter__(self) -> Callers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()


def _keep_to(cores: int | None) -> None:
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])  # of this thread


def run_turns(
    callers: Callers, tenants: list[Tenant], order: list[int], done: Callable[[Tenant, TurnTimes], None]
) -> float:
    """Give everyone in `order` a turn; `done` is called under a lock.

    With more than one caller, a session is brought back while another computes. Returns the callers' seconds of
    processor.
    """
    lock = threading.Lock()

    def work(number: int) -> None:
        times = tenants[number].turn()
        with lock:
            done(tenants[number], times)

    return callers.share(order, work)


class Timer:
    """Milliseconds from the call of `start` to device events."""

    def __init__(self, bench: Bench) -> None:
        self.stream = bench.timing
        self.began = bench.device.event(timing=True)

    def start(self) -> None:
        """Begin; the stream has no work, so the event is done at once."""
        self.began.record(self.stream)
        self.begin_s = time.perf_counter()

    def until(self, event: Any) -> float:
        """Milliseconds from `start` to `event`, once it has happened; not below zero."""
        event.synchronize()
        return max(0.0, self.began.elapsed_time(event))
