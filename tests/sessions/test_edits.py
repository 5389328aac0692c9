"""Edits do what they say, and say what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from djinn_core.errors import EditError, UsageError
from djinn_core.sessions import Ablate, Add, ProjectOut, Replace, Scale, edits
from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import Rig

HIDDEN = torch.randn((2, 5, 8), generator=torch.Generator().manual_seed(0))
VECTOR = torch.arange(8.0)


def applied(edit) -> torch.Tensor:
    before = HIDDEN.clone()
    edit.check(HIDDEN.shape, HIDDEN.dtype)
    out = edit.apply(HIDDEN)
    assert torch.equal(HIDDEN, before)
    return out


def test_add_at_positions_from_numpy() -> None:
    out = applied(Add(VECTOR.numpy(), positions=(0, -1)))
    assert torch.equal(out[:, [0, 4]], HIDDEN[:, [0, 4]] + VECTOR)
    assert torch.equal(out[:, 1:4], HIDDEN[:, 1:4])


def test_scale_replace_and_ablate() -> None:
    assert torch.equal(applied(Scale(0.9)), HIDDEN * 0.9)
    out = applied(Replace(torch.stack([VECTOR, -VECTOR]), positions=(1, 2)))
    assert torch.equal(out[0, 1], VECTOR) and torch.equal(out[1, 2], -VECTOR)
    out = applied(Ablate(positions=(3,), channels=(0, 7)))
    assert not out[:, 3, [0, 7]].any() and torch.equal(out[:, 3, 1:7], HIDDEN[:, 3, 1:7])


def test_positions_and_channels_of_numpy_and_torch() -> None:
    out = applied(Add(VECTOR, positions=np.array([0, -1])))
    assert torch.equal(out, applied(Add(VECTOR, positions=(0, 4))))
    out = applied(Ablate(positions=torch.tensor([3]), channels=np.arange(2)))
    assert torch.equal(out, applied(Ablate(positions=(3,), channels=(0, 1))))


def test_nothing_is_left_along_a_direction_projected_out() -> None:
    out = applied(ProjectOut(VECTOR, positions=(2,)))
    assert torch.allclose(out[:, 2] @ VECTOR, torch.zeros(2), atol=1e-5)
    assert torch.equal(out[:, [0, 1, 3, 4]], HIDDEN[:, [0, 1, 3, 4]])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda: Add(torch.ones(7)), r"shape \(7,\).*= \(2, 5, 8\)"),
        (lambda: Add(torch.ones(8, dtype=torch.float16)), "float16, the boundary is torch.float32"),
        (lambda: Add(VECTOR, positions=(5,)), r"positions \[5\]: the pass has 5 tokens, positions -5 to 4"),
        (lambda: Add(VECTOR, positions=-1), r"positions -1: give a sequence of whole numbers, such as \[-5\]"),
        (lambda: Add(VECTOR, positions=(0, 1.0, True)), r"positions \[1.0, True\]: the pass has 5 tokens"),
        (lambda: Scale(2, positions=[]), r"positions \[\]: the pass has 5 tokens"),
        (lambda: Ablate(channels=3), "channels 3: give a sequence"),
        (lambda: Add([1.0]), "a list; give a torch tensor"),
        (lambda: Replace(torch.ones((3, 8)), positions=(0, 1)), r"\(2, 2, 8\)"),
        (lambda: ProjectOut(torch.zeros(8)), "no length"),
        (lambda: Ablate(channels=(8,)), "channels 0 to 7"),
        (lambda: Ablate(), "needs positions"),
        (lambda: Scale("2"), "give a number"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(edit, says) -> None:
    with pytest.raises(EditError, match=says):
        edit().check(HIDDEN.shape, HIDDEN.dtype)


def test_an_edit_keeps_its_own_copy() -> None:
    values = np.ones(8, dtype=np.float32)
    edit = Add(values)
    values[:] = 5
    assert torch.equal(applied(edit), HIDDEN + 1)


def test_from_file(tmp_path) -> None:
    save_file({"direction": VECTOR}, tmp_path / "edit.safetensors")
    assert torch.equal(edits.from_file(tmp_path / "edit.safetensors", "direction"), VECTOR)
    with pytest.raises(EditError, match="it has direction"):
        edits.from_file(tmp_path / "edit.safetensors", "other")
    (tmp_path / "broken").write_bytes(b"x" * 20)
    with pytest.raises(EditError, match="not a readable"):
        edits.from_file(tmp_path / "broken", "x")


def test_steering_changes_the_output_and_leaves_the_checkpoint(rig: Rig) -> None:
    """The edited pass equals a stock pass whose layer is hooked to do the same."""
    session = rig.open()
    point = session.forward(prompt(), stop_after=2)
    edited = session.resume(edits=[Scale(0.9), Add(torch.ones(64), positions=(-1,))])
    assert torch.equal(session.resume(point), Oracle(rig.stock).forward(prompt()))

    def steer(module, args, out):
        out = out * 0.9
        out[:, -1] += 1
        return out

    handle = rig.stock.model.layers[1].register_forward_hook(steer)
    wanted = Oracle(rig.stock).forward(prompt())
    handle.remove()
    assert torch.equal(edited, wanted)
    passing = rig.open().forward(prompt(), edits={2: [Scale(0.9), Add(torch.ones(64), positions=(-1,))]})
    assert torch.equal(passing, wanted)


def test_every_edit_from_every_source_equals_the_stock_model_edited_there(rig: Rig, tmp_path) -> None:
    """The stock model's own layer returns what the edit makes of it."""
    width = rig.served.config.hidden_size
    vector = torch.randn(width, generator=torch.Generator().manual_seed(3))
    save_file({"direction": vector}, tmp_path / "edit.safetensors")
    session = rig.open()
    stopped = session.forward(prompt(), stop_after=2)
    read = edits.from_file(tmp_path / "edit.safetensors", "direction")
    for tensor in (vector, vector.numpy(), read):
        for edit in (
            Add(tensor, positions=(-1,)),
            Replace(tensor, positions=(0,)),
            ProjectOut(tensor),
            Scale(0.5, positions=(1, 2)),
            Ablate(channels=(3,)),
        ):
            hook = rig.stock.model.layers[1].register_forward_hook(lambda _, __, out, edit=edit: edited(out, edit))
            want = Oracle(rig.stock).forward(prompt())
            hook.remove()
            assert torch.equal(session.resume(stopped, edits=[edit]), want), edit
    assert torch.equal(session.resume(stopped), Oracle(rig.stock).forward(prompt()))


def edited(out, edit):
    return (edit.apply(out[0]), *out[1:]) if isinstance(out, tuple) else edit.apply(out)


def test_an_edit_that_does_not_fit_leaves_the_session_as_it_was(rig: Rig) -> None:
    session = rig.open()
    session.forward(prompt(), stop_after=2)
    with pytest.raises(EditError):
        session.resume(edits=[Add(torch.ones(3))])
    with pytest.raises(EditError, match="lies before"):
        session.resume(edits={1: [Scale(2.0)]})
    assert torch.equal(session.resume(), Oracle(rig.stock).forward(prompt()))
    with pytest.raises(EditError, match="need a layer"):
        session.forward(prompt(), edits=[Scale(2.0)])


def test_edits_at_a_stop_are_in_the_checkpoint(rig: Rig) -> None:
    session = rig.open()
    point = session.forward(prompt(), stop_after=2, edits=[Scale(0.5)])
    assert [edit.describe() for edit in point.edits] == ["Scale(factor=0.5, positions=None)"]
    plain = rig.open().forward(prompt(), stop_after=2)
    assert torch.equal(point.hidden_states(), plain.hidden_states() * 0.5)


def test_one_edit_need_not_be_in_a_list(rig: Rig) -> None:
    session = rig.open()
    point = session.forward(prompt(), stop_after=2)
    wanted = session.resume(point, edits=[Scale(0.5)])
    assert torch.equal(session.resume(point, edits=Scale(0.5)), wanted)
    assert torch.equal(session.resume(point, edits={2: Scale(0.5)}), wanted)


def test_ids_that_are_no_tensor_are_refused(rig: Rig) -> None:
    session = rig.open()
    with pytest.raises(UsageError, match=r"a list; give a tensor of whole numbers, \[1, T\]"):
        session.forward([[1, 2, 3]])
    assert session.forward(prompt()) is not None
