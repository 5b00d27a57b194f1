"""Median seconds of calls that are compared: by the clock on a CPU, in CUDA graphs on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tdq_exp.runtime.graphs import Recorded

ROUNDS = 7
REPLAYS = 20  # of a recording, one after another, between two readings of a GPU's clock


def medians(
    calls: Mapping[str, Callable[[], Tensor]], device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the median seconds of each call, in turn with the others, and what failed.

    On a GPU every call is recorded first, so that what is compared is the work and not the time in
    which the host launches it.

    Args:
        calls: by name; none changes what another reads.
        device: where they compute.

    Returns:
        Seconds by name, and by name the error of those that could not be recorded.

    Raises:
        Exception: whatever a call raises on a CPU.
    """
    if device.type == "cpu":
        return _in_turn({name: _by_the_clock(call) for name, call in calls.items()}), {}

    rounds: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        try:
            step = Recorded(call, device)
            step.prepare()
            step.record()
            rounds[name] = _by_events(step)
        except Exception as error:  # whatever a compiler of kernels may raise
            lines = str(error).strip().splitlines() or [""]
            failed[name] = f"{type(error).__name__}: {lines[0]}"[:200]
    return _in_turn(rounds), failed


def _in_turn(rounds: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in rounds}
    for number in range(ROUNDS + 2):
        for name, measure in rounds.items():
            seconds = measure()
            if number >= 2:
                times[name].append(seconds)
    return {name: sorted(values)[ROUNDS // 2] for name, values in times.items()}


def _by_the_clock(call: Callable[[], Tensor]) -> Callable[[], float]:
    def measure() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return measure


def _by_events(step: Recorded) -> Callable[[], float]:
    def measure() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(REPLAYS):
            step()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / REPLAYS

    return measure
