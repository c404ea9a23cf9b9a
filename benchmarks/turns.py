"""Timing in turns: what is compared runs side by side, so that a busy machine is equally busy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def in_turns(
    sides: dict[str, Callable[[int], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], None] = lambda: None,
    least: int = 5,
) -> list[dict[str, float]]:
    """Seconds that every side takes in every round, after one round that is not counted.

    Every second round goes backwards, so that no side always comes after the same other one.

    Args:
        sides: functions of the round's number.
        seconds: rounds are begun for so long. least: how many there are whatever time they take.
        clock: what is read. `time.process_time` for what runs on one thread: others on the machine do not count.
        wait: called before the clock is read, for work that a device does on its own.
    """
    rounds: list[dict[str, float]] = []
    end = float("inf")
    while len(rounds) <= least or time.perf_counter() < end:
        times = {}
        for name in sorted(sides, reverse=len(rounds) % 2 == 1):
            wait()
            start = clock()
            sides[name](len(rounds))
            wait()
            times[name] = clock() - start
        if not rounds:
            end = time.perf_counter() + seconds
        rounds.append(times)
    return rounds[1:]


def ratio(rounds: list[dict[str, float]], above: str, below: str) -> float:
    """Median over the rounds of the time of one side by that of another."""
    return statistics.median(times[above] / times[below] for times in rounds)
