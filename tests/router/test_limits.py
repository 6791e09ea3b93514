import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.router.limits import Window


@pytest.mark.parametrize(
    ("added", "now", "total"),
    [
        ([], 100.0, 0),
        ([(100.0, 3)], 100.0, 3),
        ([(100.0, 3), (100.9, 4)], 159.99, 7),
        ([(100.9, 3)], 160.0, 0),  # what came within one second goes with it
        ([(100.0, 3), (101.0, 4)], 160.5, 4),
        ([(100.0, 3), (130.0, 4)], 189.9, 4),
        ([(100.0, 3), (100_000.0, 4)], 100_001.0, 4),
        ([(0.0, 3)], 59.9, 3),
    ],
)
def test_total(added: list[tuple[float, int]], now: float, total: int) -> None:
    window = Window()
    for at, n in added:
        window.add(n, at)
    assert window.peek(now) == total
    assert window.total(now) == total


@pytest.mark.parametrize(
    ("limit", "now", "seconds"),
    [
        (6, 110.0, 0.0),
        (5, 110.0, 50.0),  # the first 2 go at 160
        (4, 110.25, 49.75),
        (3, 110.0, 55.0),  # 3 more at 165
        (1, 110.0, 55.0),
    ],
)
def test_seconds_until_below(limit: int, now: float, seconds: float) -> None:
    window = Window()
    window.add(2, 100.5)
    window.add(3, 105.0)
    assert window.seconds_until_below(limit, now) == seconds


def test_nothing_is_below_zero() -> None:
    with pytest.raises(ValueError, match="limit 0: nothing is below it; use 1 or more"):
        Window().seconds_until_below(0, 1.0)


STEPS = st.lists(st.tuples(st.floats(0, 90) | st.integers(0, 90), st.integers(0, 50)), max_size=60)


@given(st.floats(0, 1e6), STEPS, st.integers(1, 200))
def test_the_same_as_a_list(start: float, steps: list[tuple[float, int]], limit: int) -> None:
    window, added, now = Window(), list[tuple[float, int]](), start
    for pause, n in steps:
        now += pause
        window.add(n, now)
        added.append((now, n))
        assert window.total(now) == listed(added, now)
        wait = window.seconds_until_below(limit, now)
        if listed(added, now) < limit:
            assert wait == 0
        else:
            # it comes true with the next whole second of the wait's end, and not in the second before it
            frees = round(now + wait)
            assert abs(now + wait - frees) < 1e-6
            assert listed(added, frees) < limit <= listed(added, frees - 1)
            assert 0 < wait <= 60


def listed(added: list[tuple[float, int]], now: float) -> int:
    return sum(n for at, n in added if int(now) - int(at) < 60)
