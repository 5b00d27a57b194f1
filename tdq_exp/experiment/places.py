"""Where the stages of a row were computed: commit, machine, device, threads, kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tdq_exp.quant import kernels
from tdq_exp.runtime import environment
from tdq_exp.runtime.processes import Processes

# A place of which nothing was noted.
UNKNOWN: dict[str, Any] = {"environment": {"machine": "unknown", "commit": "unknown"}}


def place_of(processes: Processes) -> dict[str, Any]:
    """Return where processes compute: device, processes, threads, kernels, environment."""
    return {
        "device": processes.device.type,
        "processes": processes.world,
        "threads": torch.get_num_threads(),
        "kernels": kernels.used(processes.device),
        "environment": environment.environment(processes.device.type),
    }


def made_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return where a row's images were sampled, as far as the row tells."""
    place: dict[str, Any] = {
        key: row[key] for key in ("device", "processes", "threads", "kernels") if key in row
    }
    environments = row.get("sampled_on") or [row["environment"]]
    return [{**place, "environment": environment} for environment in environments]


def environments(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return where a row was measured, and where its network was fitted and its images sampled."""
    fitted = row.get("fitted_on")
    places = [row["environment"], *([fitted] if fitted else []), *row.get("sampled_on", [])]
    return [place for i, place in enumerate(places) if place not in places[:i]]


def machine_of(place: Mapping[str, Any]) -> str:
    """Return the machine of an environment, with its accelerator, for a reader."""
    gpu = place.get("accelerator")
    return f"{place['machine']}, {gpu}" if gpu else str(place["machine"])
