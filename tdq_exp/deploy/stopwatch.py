"""Median seconds of calls that are compared: by the clock on a CPU, in CUDA graphs on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from tdq_exp.runtime.graphs import Recorded, UnusableDevice

ROUNDS = 7
REPLAYS = 20  # of a recording, one after another, between two readings of a GPU's clock
CALLS = 20  # of a layer in one recording: a GPU takes less time for one than the host to launch it


def medians(
    calls: Mapping[str, Callable[[], Tensor]], device: torch.device, together: int = 1
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the median seconds of each call, in turn with the others, and what failed.

    On a GPU every call is recorded first, so that what is compared is the work and not the time in
    which the host launches it.

    Args:
        calls: by name; none changes what another reads.
        device: where they compute.
        together: how often a recording makes its call, at most `REPLAYS`.

    Returns:
        Seconds by name, and by name the error of those that could not be recorded.

    Raises:
        UnusableDevice: if a failed recording left the device so.
        Exception: whatever a call raises on a CPU.
    """
    if device.type == "cpu":
        return _in_turn({name: _by_the_clock(call) for name, call in calls.items()}), {}

    # Events are of the current device, and replays of the one that was recorded.
    rounds: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    with torch.cuda.device(device):
        for name, call in calls.items():
            try:
                step = Recorded(partial(_repeated, call, together), device)
                step.prepare()
                step.record()
                measure = _by_events(step, together)
                measure()  # a first replay may fail, too
                rounds[name] = measure
            except UnusableDevice:
                raise
            except Exception as error:  # whatever a compiler of kernels may raise
                failed[name] = in_one_line(error)
        return _in_turn(rounds), failed


def in_one_line(error: Exception) -> str:
    """Return what an error says, without the rest of a compiler's message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _repeated(call: Callable[[], Tensor], times: int) -> Tensor:
    for _ in range(times - 1):
        call()
    return call()


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


def _by_events(step: Recorded[Tensor], together: int) -> Callable[[], float]:
    replays = REPLAYS // together

    def measure() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        step()  # the GPU is at work while the host launches what is measured
        began.record()
        for _ in range(replays):
            step()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / (replays * together)

    return measure
