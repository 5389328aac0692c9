"""A session: an inference that can stop at a layer, leave the GPU, be edited or forked, and go on from exactly there.

A session is used by one caller at a time; different sessions may be used at once. All state of an inference lies here
and in its holding, none on the model. Not taken: suspending inside `model.generate`. It holds its state on the stack of
its caller; here generation is a loop over passes, each of which can stop.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from djinn_core.errors import BreakpointError, SessionStateError, UsageError
from djinn_core.interrupts import act
from djinn_core.models.boundary import RUNNING, PassStopped
from djinn_core.sessions.behind import write_behind
from djinn_core.sessions.breakpoints import Breakpoint, check_breakpoint, check_layer
from djinn_core.sessions.checkpoint import Checkpoint, PassInputs, Story
from djinn_core.sessions.edits import Edit, apply_edits
from djinn_core.sessions.entrance import enter_boundary, keep_boundary, load_boundary, reserve_boundary
from djinn_core.sessions.generation import Chooser
from djinn_core.sessions.holding import Holding, Use
from djinn_core.sessions.inputs import NO_EDITS, EditsByLayer, check_between, check_later, edits_by_layer, make_inputs
from djinn_core.sessions.kvcache import SessionCache, attention_windows
from djinn_core.sessions.passes import Control
from djinn_core.sessions.sampling import Sampling
from djinn_core.sessions.staging import Slot
from djinn_core.sessions.state import SessionState, refusal
from djinn_core.sessions.trace import Trace

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from djinn_core.sessions.pager import Pager

GREEDY = Sampling()


class Session:
    """One inference on one model. Made by `open_session`, `fork` and `load_session`.

    Attributes:
        id: unique in the process.
        stopped: the checkpoint at which the last pass stopped, None when it ran to its end.
        trace: where the time of the last resume went; None before the first.
    """

    def __init__(self, model: PreTrainedModel, pager: Pager, holding: Holding, story: Story | None = None) -> None:
        self._model = model
        self._pager = pager
        self._holding = holding
        self._layers = holding.layout.layers
        self._hidden = model.config.get_text_config(decoder=True).hidden_size
        self._cache = SessionCache(attention_windows(model.config), holding.layout, holding.region, holding.table)
        self._story = story or Story()
        self._generator: torch.Generator | None = None
        known = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._has_positions = "position_ids" in known
        self.id = holding.id
        self.stopped: Checkpoint | None = None
        self.trace: Trace | None = None

    # what it is

    @property
    def state(self) -> SessionState:
        return self._holding.state

    @property
    def length(self) -> int:
        """Tokens whose KV every layer has."""
        return min(self._holding.table.lengths)

    @property
    def max_length(self) -> int:
        return self._holding.layout.max_length

    @property
    def batch_size(self) -> int:
        return self._holding.layout.batch_size

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All that it can go back to, oldest first."""
        return tuple(self._holding.checkpoints)

    @property
    def logits(self) -> torch.Tensor | None:
        """[B, vocab] of the last complete pass."""
        return self._story.logits

    @property
    def ids(self) -> torch.Tensor:
        """[B, n] of every token that it was given or has chosen; after an error in `generate` too."""
        story, stopped = self._story, self.stopped
        last = story.pending if stopped is None else stopped.inputs.ids
        pieces = story.ids if last is None else (*story.ids, last)
        return torch.cat(pieces, dim=1) if pieces else torch.empty((self.batch_size, 0), dtype=torch.long)

    @property
    def device_bytes(self) -> int:
        """Device memory behind its KV, shared blocks included."""
        return self._holding.device_bytes

    def _need_running(self, doing: str) -> None:
        state = self.state  # before the look at failures: one that comes after it is told by the pass
        self._pager.raise_failed(self._holding)
        if state not in (SessionState.RUNNING, SessionState.RESUMING):
            raise refusal(self.id, state, doing) from self._holding.failure
        if self.stopped is not None:
            where = f"its last pass stopped after layer {self.stopped.layer}; resume it, or an earlier checkpoint"
            raise SessionStateError(f"session {self.id} cannot {doing}: {where}")

    # running

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        stop_after: int | None = None,
        edits: Sequence[Edit] | Mapping[int, Sequence[Edit]] = (),
    ) -> torch.Tensor | Checkpoint:
        """Run `input_ids` [B, T] behind what the session holds: logits [B, vocab] of the last position.

        Asynchronous, as any forward: the logits are complete on the caller's stream. A token that `generate` chose
        last and no pass has taken yet goes before them.

        Args:
            attention_mask: [B, T], 0 for padding in these ids; what came before is remembered.
            stop_after: stop the pass after this layer (1 to the number of layers) and return the checkpoint there.
            edits: of the hidden states: a mapping from layer to edits, or edits for the layer of `stop_after`.

        Raises:
            SessionStateError: the session is paused, stopped in a pass, or would grow past its `max_length`.
            OutOfDeviceMemory: running sessions, or others on the device, leave no room; the session is whole, try again
                after pausing one.
        """
        with Use(self._holding, "run"):
            self._need_running("run")
            if stop_after is not None:
                check_layer(stop_after, self._layers)
            inputs = self._inputs(input_ids, attention_mask)
            by_layer = self._edits(edits, stop_after, inputs.ids.shape[1])
            story = replace(self._story, pending=None, unfinished=None)
            return self._run(story, inputs, 0, stop_after, by_layer)

    def generate(
        self, max_new_tokens: int, *, stop_at: Breakpoint | None = None, sampling: Sampling = GREEDY
    ) -> torch.Tensor:
        """Choose up to `max_new_tokens` after what has been run: new ids [B, n], as `model.generate` would.

        With `stop_at`, returns the tokens chosen so far when the breakpoint fires; `session.stopped` is the checkpoint.
        What was chosen before an error, or Ctrl-C, is in `ids`, and the next call goes on there.

        Raises:
            BreakpointError: it names a place that does not exist, or every sequence ended before it fired.
            SessionStateError: nothing has been run yet, or as for `forward`.
        """
        with Use(self._holding, "generate"):
            self._need_running("generate")
            if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
                raise UsageError(f"max_new_tokens is {max_new_tokens!r}; give a whole number from 1")
            if stop_at is not None:
                check_breakpoint(stop_at, self._layers, max_new_tokens)
            if self._story.logits is None:
                raise SessionStateError(f"session {self.id} cannot generate: it has no prompt; run one with forward")
            chooser = Chooser(self._model, sampling, self._story, self._random(sampling))
            new: list[torch.Tensor] = []
            for number in range(max_new_tokens):
                if self._story.pending is not None:
                    self._run_pending(None)
                if not chooser.any_unfinished(self._story):
                    break
                self._story, token = chooser.choose(self._story)
                new.append(token)
                if stop_at is not None and stop_at.token == number:
                    self._run_pending(stop_at.layer)
                    break
            if stop_at is not None and self.stopped is None:
                raise BreakpointError(
                    f"the breakpoint at token {stop_at.token} did not fire: every sequence had ended after {len(new)} "
                    "tokens"
                )
            if not new:
                return self._story.logits.new_empty((self.batch_size, 0), dtype=torch.long)
            return torch.cat(new, dim=1)

    def _random(self, sampling: Sampling) -> torch.Generator | None:
        """The session's own stream of random numbers; torch's global one is not touched."""
        if not sampling.do_sample:
            return None
        if self._generator is None:
            self._generator = torch.Generator(self._pager.device.torch_device)
            if self._story.rng is not None:
                self._generator.set_state(self._story.rng)
        if sampling.seed is not None:
            self._generator.manual_seed(sampling.seed)
        return self._generator

    def _run_pending(self, stop: int | None) -> None:
        inputs = self._inputs(torch.empty((self.batch_size, 0), dtype=torch.long), None)
        self._run(replace(self._story, pending=None), inputs, 0, stop, NO_EDITS)

    def _inputs(self, ids: torch.Tensor, mask: torch.Tensor | None) -> PassInputs:
        inputs = make_inputs(self._model, self._holding, self._story, ids, mask, self._pager.device.torch_device)
        return inputs if self._has_positions else replace(inputs, positions=None)

    def _edits(
        self, edits: Sequence[Edit] | Mapping[int, Sequence[Edit]], stop: int | None, tokens: int
    ) -> EditsByLayer:
        return edits_by_layer(edits, stop, tokens, self._holding.layout, self._hidden)

    def _run(
        self,
        story: Story,
        inputs: PassInputs,
        first: int,
        stop: int | None,
        edits: EditsByLayer,
        enter: Callable[[torch.Tensor], torch.Tensor] | None = None,
        earlier: tuple[Edit, ...] = (),
        *,
        claimed: bool = False,
    ) -> torch.Tensor | Checkpoint:
        """One pass of layers `first` to `stop`; the session has moved on only when it returns."""
        pager, holding, last = self._pager, self._holding, stop or self._layers
        new, boundary, point = inputs.ids.shape[1], None, None
        before, was = list(holding.table.lengths), (self._story, self.stopped)
        try:
            pager.enter_pass(holding)
            if stop is not None:
                boundary = reserve_boundary(pager, holding, new, self._hidden)
            if not claimed:
                pager.claim(holding, first, last, new)
            compute = pager.device.current_stream()
            control = Control(
                *(first, stop, holding.jobs, compute, pager),
                enter=enter,
                edits=edits,
                keep=lambda hidden: keep_boundary(pager, boundary, hidden),
                layers=self._layers,
                behind=None if stop is None else write_behind(pager, holding, new),
            )
            out = self._call(control, inputs, holding.start_of(first, new))
            pager.settle(holding, first, last, new)
            if stop is None:
                self._story = replace(story, ids=(*story.ids, inputs.ids), mask=inputs.mask, logits=out)
                self.stopped = None
                act()
                return out
            applied = earlier + tuple(edit for layer in sorted(edits) for edit in edits[layer])
            self._story = self._with_random(story)
            with pager.lock:
                point = Checkpoint(stop, boundary, inputs, holding.table.copy(), self._story, applied)
            pager.add_checkpoint(holding, point)
            self.stopped = point
            act()
            pager.boundary_issued(boundary)
            return point
        except BaseException:
            self._story, self.stopped = was
            try:
                pager.abandon(holding, before)
            finally:
                if point is not None and point in holding.checkpoints:
                    pager.drop_checkpoint(holding, point)
                elif boundary is not None:
                    pager.discard_boundary(boundary)
            raise

    def _call(self, control: Control, inputs: PassInputs, start: int) -> torch.Tensor | None:
        """The model's own forward; None when the control stopped it."""
        given = dict(self._options)
        if inputs.mask is not None:
            given["attention_mask"] = inputs.mask
        if inputs.positions is not None:
            given["position_ids"] = inputs.positions
        token = RUNNING.set(control)
        self._cache.begin(start)
        try:
            with torch.no_grad():
                out = self._model(
                    input_ids=inputs.ids, past_key_values=self._cache, use_cache=True, return_dict=True, **given
                )
            logits = out.logits[:, -1]  # of many positions, a copy: a view would keep them all
            return logits.clone() if out.logits.shape[1] > 1 else logits
        except PassStopped:
            return None
        finally:
            self._cache.end()
            RUNNING.reset(token)

    # pausing and resuming

    def pause(self, *, expected_resume_s: float | None = None, release: bool = False) -> None:
        """Leave the GPU: returns at once, and the state is written back behind the work that is queued. After that its
        memory belongs to whoever needs it; until then a resume finds it in place. Of a session that is paused already
        only what is expected of it changes, to what is said now.

        Args:
            expected_resume_s: seconds from now at which it will probably be resumed; it is brought back just before.
            release: give the memory up as soon as it is written back, whether anyone needs it or not.
        """
        with Use(self._holding, "be paused"):
            self._holding.done_reading()
            self._pager.pause(self._holding, expected_resume_s, release)

    def resume(
        self,
        checkpoint: Checkpoint | None = None,
        *,
        edits: Sequence[Edit] | Mapping[int, Sequence[Edit]] = (),
        stop_after: int | None = None,
    ) -> torch.Tensor | Checkpoint | None:
        """Go on from `checkpoint`, or from where the session stands.

        In a stopped pass: layers that have been executed are not executed again, the boundary goes in, and the rest of
        the pass runs: its logits [B, vocab], or another checkpoint when `stop_after` names a later layer. Between
        tokens: None; the next `forward` or `generate` goes on. The checkpoint stays as it was.

        Args:
            edits: of the boundary, before it goes in; or a mapping from layer to edits.
        """
        begun_s, holding = time.perf_counter(), self._holding
        with Use(holding, "resume"):  # as little as may be comes before a boundary's copy
            place = self.stopped if checkpoint is None else holding.own(checkpoint)
            state = holding.state
            if state in (SessionState.CLOSED, SessionState.FAILED) or (place is None and state is SessionState.RUNNING):
                raise refusal(self.id, state, "resume") from holding.failure
            if holding.reading is not None:
                holding.done_reading()
            if place is None or place.boundary is None:
                return self._resume_between(place, begun_s, edits, stop_after)
            return self._resume_stopped(place, begun_s, edits, stop_after)

    def _resume_between(self, place: Checkpoint | None, begun_s: float, edits: object, stop_after: int | None) -> None:
        check_between(self.id, edits, stop_after)
        pager, holding, trace = self._pager, self._holding, Trace(begun_s)
        with pager.way, pager.device.keeping_interpreter():
            trace.there(pager.device, pager.staging.idle_stream)
            if place is not None:
                pager.adopt(holding, place)
                self._stand_at(place)
            trace.mark("lineage")
            trace.brought(pager.resume(holding, 0, 0, 0), holding.jobs, 0)
        trace.mark("bring-in begun")
        self.trace = trace

    def _resume_stopped(
        self,
        place: Checkpoint,
        begun_s: float,
        edits: Sequence[Edit] | Mapping[int, Sequence[Edit]],
        stop_after: int | None,
    ) -> torch.Tensor | Checkpoint:
        pager, holding, entered, slot = self._pager, self._holding, False, None

        def enter(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal entered
            entered = True
            return apply_edits(by_layer.get(place.layer, ()), enter_boundary(pager, place.boundary, slot))

        try:
            with pager.way, pager.device.keeping_interpreter():
                slot = load_boundary(pager, holding, place.boundary, stands_at=self.stopped)
                trace = Trace(begun_s, slot.ready if isinstance(slot, Slot) else None)
                if trace.ready is None:
                    trace.there(pager.device, pager.device.current_stream())
                trace.mark("boundary issued")
                if stop_after is not None and check_layer(stop_after, self._layers) <= place.layer:
                    raise BreakpointError(f"executed to layer {place.layer} already; it cannot stop after {stop_after}")
                given = edits if isinstance(edits, Mapping) or not edits else {place.layer: edits}
                tokens = place.inputs.ids.shape[1]
                by_layer = self._edits(given, stop_after, tokens)
                check_later(place.layer, by_layer)
                if not self._stands_at(place):
                    pager.adopt(holding, place)
                    self._stand_at(place)
                trace.mark("lineage")
                job = pager.resume(holding, place.layer, stop_after or self._layers, tokens)
                trace.brought(job, holding.jobs, place.layer)
            trace.mark("bring-in begun")
            later = {layer: some for layer, some in by_layer.items() if layer > place.layer}
            applied = place.edits + tuple(by_layer.get(place.layer, ()))
            out = self._run(place.story, place.inputs, place.layer, stop_after, later, enter, applied, claimed=True)
        finally:
            if not entered and isinstance(slot, Slot):
                pager.staging.give_back(slot)
        trace.mark("pass issued")
        self.trace = trace
        return out

    def _stands_at(self, place: Checkpoint) -> bool:
        """The lineage is the checkpoint's own already."""
        table = self._holding.table
        return self.stopped is place and table.lengths == place.table.lengths and table.blocks == place.table.blocks

    def _stand_at(self, place: Checkpoint) -> None:
        self._story = place.story
        self._generator = None
        self.stopped = place if place.boundary is not None else None

    def prefetch(self) -> None:
        """Begin to bring a paused session back, without running it. It stays paused, and may leave again."""
        with Use(self._holding, "be prefetched"):
            self._pager.prefetch(self._holding)

    def wait_until(self, what: str, timeout_s: float) -> None:
        """Block until the session is ``"clean"`` (written back), ``"released"`` (off the device) or ``"restored"``.

        Raises:
            TimeoutError: it was not, in time.
            DjinnError: `timeout_s` is no number, nobody has paused it, or a transfer failed; it says what is left.
        """
        self._pager.wait_until(self._holding, what, timeout_s)

    # checkpoints, branches, copies

    def checkpoint(self) -> Checkpoint:
        """A checkpoint of where the session stands: between tokens, or the stopped pass's own."""
        with Use(self._holding, "be checkpointed"):
            if self.state in (SessionState.CLOSED, SessionState.FAILED):
                raise refusal(self.id, self.state, "be checkpointed")
            if self.stopped is not None:
                return self.stopped
            self._story = self._with_random(self._story)
            with self._pager.lock:
                point = Checkpoint(None, None, None, self._holding.table.copy(), self._story)
            self._pager.add_checkpoint(self._holding, point)
            return point

    def drop(self, checkpoint: Checkpoint) -> None:
        """Forget a checkpoint, and give up what only it refers to."""
        with Use(self._holding, "drop a checkpoint"):
            own = self._holding.own(checkpoint)
            if own is self.stopped:
                raise SessionStateError(f"session {self.id} stands at {own.id}; resume it, or another one, first")
            self._holding.done_reading()
            self._pager.drop_checkpoint(self._holding, own)

    def _with_random(self, story: Story) -> Story:
        return story if self._generator is None else replace(story, rng=self._generator.get_state())

    def fork(self) -> Session:
        """Another session that stands where this one does, and shares its memory. It is paused: resume it."""
        with Use(self._holding, "be forked"):
            if self.state in (SessionState.CLOSED, SessionState.FAILED):
                raise refusal(self.id, self.state, "be forked")
            self._holding.wait_issued(interruptible=True)
            self._story = self._with_random(self._story)
            with ExitStack() as undo:
                twin = self._pager.fork(self._holding)
                undo.callback(self._pager.close_session, twin)
                branch = Session(self._model, self._pager, twin, self._story)
                if self.stopped is not None:
                    branch.stopped = twin.checkpoints[self.checkpoints.index(self.stopped)]
                act()
                undo.pop_all()
            return branch

    def save(self, folder: str | Path) -> None:
        """Write the session and its checkpoints to `folder`: safetensors and JSON, complete or not at all."""
        from djinn_core.sessions.snapshot import save_session  # which knows this class

        with Use(self._holding, "be saved"):
            if self.state in (SessionState.CLOSED, SessionState.FAILED):
                raise refusal(self.id, self.state, "be saved")
            self._story = self._with_random(self._story)
            save_session(self, folder)

    def close(self) -> None:
        """Give up everything that it holds. Twice is once."""
        with Use(self._holding, "be closed"):
            if self.state is SessionState.CLOSED:
                return
            self._pager.close_session(self._holding)
            self.stopped = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({self.id}, {self.state.value}, {self.length} of {self.max_length} tokens)"
