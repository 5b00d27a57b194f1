"""How the activations of a float network depend on t (Figure 2).

r is Pearson's correlation of t with a tensor's standard deviation, or with its range (maximum -
minimum), over a batch. It tells how straight the relation is, not how large: the relative change
(maximum - minimum) / mean of the standard deviation over t stands beside it.

A network depends on t in two ways, through x_t and through the embedding of t that its layers read.
Two more measurements take them apart: x_t as it comes with t held at T / 2 in the network, and x_t
held at the middle of the trajectory with t as it comes.

References:
    So et al., arXiv 2306.02316, section 3: |r| > 0.5 in 62.1 % and > 0.7 in 38.8 % of the layers,
    less in latent diffusion.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdq_exp.analysis.trajectory import Note, Trajectory, float_trajectory, rounded, watching
from tdq_exp.experiment.build import Experiment
from tdq_exp.models.pixel import DiffusionModel

MEASURES = ("deviation", "range")
BOUNDS = (0.5, 0.7)
TIME = ("time_embedding", "time_projection")  # their inputs are a function of t and nothing else
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SHOWN = 6  # tensors that have boxes
KEPT = 100_000  # values of a tensor that quantiles are taken of


def watched(model: DiffusionModel, net: nn.Module) -> dict[str, nn.Module]:
    """Return tensor -> a layer that reads it, of those that see more than t.

    q, k and v of one attention read one tensor.
    """
    layers: dict[str, nn.Module] = {}
    for name, role in model.roles(net).items():
        if role.kind not in TIME:
            layers.setdefault(role.reads or name, net.get_submodule(name))
    return layers


def measure(job: Experiment, net: nn.Module, images: int, steps: int) -> dict[str, Any]:
    """Watch every input of a convolution or a linear layer while the float network samples.

    Args:
        job: of the float network.
        net: the network.
        images: sampled together.
        steps: time steps that are looked at.

    Returns:
        `tensors`: tensor -> r of each measure, and the relative change; `shares`: of the tensors
        beyond each bound; `held`: the same shares, and median changes, with t or x_t held; `boxes`:
        quantiles of a few tensors over t.
    """
    trajectory = float_trajectory(job, net, images, steps)
    middle = steps // 2
    t_held, x_held = job.model.schedule.steps // 2, trajectory.x[middle]

    both = spreads(job, net, trajectory)
    through_x = spreads(job, net, ((t_held, x) for _, x in trajectory))
    through_t = spreads(job, net, ((t, x_held) for t, _ in trajectory))

    tensors = relations(trajectory.t, both)
    record = {
        "tensors": tensors,
        "shares": shares(tensors),
        "held": {
            "nothing": summary(tensors),
            "t": summary(relations(trajectory.t, through_x)),
            "x_t": summary(relations(trajectory.t, through_t)),
        },
        "boxes": boxes(job, net, trajectory, chosen(list(tensors))),
    }
    return rounded(record)


@torch.no_grad()
def spreads(
    job: Experiment, net: nn.Module, states: Iterable[tuple[int, Tensor]]
) -> dict[str, Tensor]:
    """Return tensor -> `[S, 2]`, its standard deviation and range at every state (t, x_t)."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def note(name: str) -> Note:
        def keep(layer: nn.Module, x: Tensor, y: Tensor) -> None:
            seen[name].append(torch.stack([x.std(), x.max() - x.min()]))

        return keep

    with watching(watched(job.model, net), note):
        for t, x in states:
            job.model.predict(net, x, torch.tensor(t))
    return {name: torch.stack(values) for name, values in seen.items()}


def relations(t: list[int], seen: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return tensor -> r of each measure, and `change`, of the standard deviation."""
    time = torch.tensor(t, dtype=torch.float64)
    result = {}

    for name, values in seen.items():
        columns = values.double().T
        of_tensor = {
            measure: float(torch.corrcoef(torch.stack([time, column]))[0, 1])
            for measure, column in zip(MEASURES, columns, strict=True)
        }
        deviation = columns[0]
        change = float((deviation.max() - deviation.min()) / deviation.mean())
        result[name] = {**of_tensor, "change": change}

    return result


def shares(tensors: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return `deviation > 0.5` and the like -> share of the tensors."""
    return {
        f"{measure} > {bound}": sum(abs(r[measure]) > bound for r in tensors.values())
        / len(tensors)
        for measure in MEASURES
        for bound in BOUNDS
    }


def summary(tensors: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the shares, and medians of the relative change by what a tensor is the input of."""
    changes = [r["change"] for r in tensors.values()]
    second = [r["change"] for name, r in tensors.items() if name.endswith(".conv2")]
    return {
        **shares(tensors),
        "median change": statistics.median(changes),
        "median change before second convolutions": statistics.median(second) if second else 0.0,
    }


def chosen(names: list[str]) -> list[str]:
    """Return a few tensors, evenly spread over the depth of the network, both ends among them."""
    if len(names) <= SHOWN:
        return names
    return [names[round(i * (len(names) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


@torch.no_grad()
def boxes(
    job: Experiment, net: nn.Module, trajectory: Trajectory, names: list[str]
) -> dict[str, Any]:
    """Return `t`, and for each tensor its `QUANTILES` at about ten time steps."""
    stride = max(len(trajectory.t) // 10, 1)
    seen: dict[str, list[Any]] = defaultdict(list)
    wanted = torch.tensor(QUANTILES)

    def note(name: str) -> Note:
        def keep(layer: nn.Module, x: Tensor, y: Tensor) -> None:
            values = x.flatten()
            values = values[:: -(-len(values) // KEPT)]
            between = torch.quantile(values, wanted[1:-1]).tolist()
            seen[name].append([float(x.min()), *between, float(x.max())])

        return keep

    layers = watched(job.model, net)
    states = list(trajectory)[::stride]
    with watching({name: layers[name] for name in names}, note):
        for t, x in states:
            job.model.predict(net, x, torch.tensor(t))
    return {"t": [t for t, _ in states], "tensors": dict(seen)}
