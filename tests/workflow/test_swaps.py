"""How long swaps ran alone and together, against intervals whose answer can be seen."""

import pytest

from workflow.scripts.pressure_systems.swaps import overlap


@pytest.mark.parametrize(
    ("first", "second", "spans"),
    [
        ([], [], (0, 0, 0)),
        ([(0, 10)], [], (10, 0, 0)),
        ([(0, 10)], [(4, 6)], (8, 0, 2)),
        ([(0, 4), (2, 8)], [(6, 10)], (6, 2, 2)),
        ([(0, 1), (5, 6)], [(1, 5)], (2, 4, 0)),
    ],
)
def test_overlap(first, second, spans):
    assert overlap(first, second) == pytest.approx(spans)
