"""What a step's kernels are called with: where a tensor's addresses stand, and how what it makes is handed on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings")

from djinn_core.device.cudagraphs import copied_by_kernel, relocated
from djinn_core.errors import DeviceError


def words_of(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_addresses_within_a_tensor_are_found_with_their_distance() -> None:
    one, other = torch.zeros(16), torch.zeros(4, 4)
    end = one.data_ptr() + 64
    outside = [each for each in (end, other.data_ptr() - 8, 0, 2**64 - 1) if not within(each, one, other)]
    columns, of, distances = relocated(words_of(*outside, one.data_ptr(), other.data_ptr() + 12, end - 1), [one, other])
    begin = len(outside)
    assert columns.tolist() == [begin, begin + 1, begin + 2]
    assert of.tolist() == [0, 1, 0] and distances.tolist() == [0, 12, 63]


def within(address: int, *tensors: torch.Tensor) -> bool:
    return any(each.data_ptr() <= address < each.data_ptr() + each.nbytes for each in tensors)


def test_a_slice_reaches_as_far_as_its_strides() -> None:
    whole = torch.zeros(2, 12)
    part = whole[:, 4:8]
    last = part.data_ptr() + (12 + 3) * 4
    columns, _, distances = relocated(words_of(last, last + 4, whole.data_ptr()), [part])
    assert columns.tolist() == [0] and distances.tolist() == [60]


def test_what_lies_in_two_of_them_counts_as_of_the_one_that_begins_last() -> None:
    whole = torch.zeros(12)
    for tensors in ([whole, whole[4:]], [whole[4:], whole]):
        _, of, distances = relocated(words_of(whole.data_ptr() + 20), tensors)
        assert tensors[int(of[0])].data_ptr() == whole[4:].data_ptr() and distances.tolist() == [4]


def test_a_row_of_other_tensors_gets_its_own_addresses() -> None:
    mine, yours = [torch.zeros(8), torch.zeros(8)], [torch.zeros(8), torch.zeros(8)]
    words = words_of(5, mine[1].data_ptr() + 8, mine[0].data_ptr())
    columns, of, distances = relocated(words, mine)
    words[columns] = np.array([each.data_ptr() for each in yours], dtype=np.uint64)[of] + distances
    assert words.tolist() == [5, yours[1].data_ptr() + 8, yours[0].data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.bool])
def test_what_a_step_makes_is_copied_bit_for_bit(dtype) -> None:
    bits = torch.randint(0, 2, (4, 3, 8), dtype=torch.uint8)
    made = bits.to(torch.bool) if dtype is torch.bool else (bits * 255).view(dtype)
    made = made.transpose(0, 1)
    into = torch.empty_strided(made.shape, made.stride(), dtype=dtype)
    copied_by_kernel(made, into)
    assert torch.equal(into.contiguous().view(torch.uint8), made.contiguous().view(torch.uint8))


@pytest.mark.parametrize("made", [torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 3).cdouble()])
def test_what_does_not_fit_is_refused(made) -> None:
    into = torch.zeros(4, 3, dtype=made.dtype if made.is_complex() else torch.float32)
    with pytest.raises(DeviceError, match="a step made"):
        copied_by_kernel(made, into)
    assert not into.any()
