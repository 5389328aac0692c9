"""The order in which the methods of a repeat run: nobody may owe its time to whoever always runs before it."""

from collections import Counter
from itertools import pairwise

import pytest

from workflow.scripts.resume import balanced


@pytest.mark.parametrize("count", range(1, 8))
def test_everyone_runs_equally_often_behind_each_other_one(count):
    repeats = 2 * count if count % 2 else count
    orders = [balanced(list(range(count)), repeat) for repeat in range(repeats)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    neighbours = Counter(pair for order in orders for pair in pairwise(order))
    assert neighbours == {(a, b): 2 if count % 2 else 1 for a in range(count) for b in range(count) if a != b}


def test_everyone_is_first_in_turn():
    assert [balanced([0, 1, 2, 3, 4, 5], repeat)[0] for repeat in range(6)] == [0, 1, 2, 3, 4, 5]
