"""What a run would take on a GPU that was measured before: hours and memory, for plans.

`configs/cards.yaml` holds the seconds of one image on a card, for the two networks of the paper,
and the memory of a training and of sampling in the batches that were measured. Of another network
they are scaled by the multiplications of a forward pass; nothing is said of small ones, which a
card does not fill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tdq_exp.config import assets
from tdq_exp.deploy.operations import products
from tdq_exp.diffusion.draws import Stream
from tdq_exp.experiment.build import Experiment

SMALLEST = 0.1  # of the measured network: one that fills a card less is not told by its operations
FLOAT, STATIC, TEMPORAL = "float", "LSQ", "LSQ+TDQ"  # forms of a network that were measured

_COUNTED: dict[str, int] = {}  # multiplications by network: the cells of a table share networks


@dataclass(frozen=True)
class CardCost:
    """What a run would take on one card.

    Args:
        card: its name.
        precision: of the training; images are computed in float32.
        fit_seconds, sample_seconds: of the stages.
        memory_gb: of the training, in the batches that were measured; None if it was not.
        sample_gb: of sampling and decoding, at most: in proportion to the batch that was measured;
            None if it was not.
        measured: this network itself was measured, and not another one.
        singly: its training was measured without CUDA graphs, which a fit uses.
    """

    card: str
    precision: str
    fit_seconds: float
    sample_seconds: float
    memory_gb: float | None
    measured: bool
    singly: bool = False
    sample_gb: float | None = None

    @property
    def seconds(self) -> float:
        """Return the time of fit and sampling together."""
        return self.fit_seconds + self.sample_seconds


def estimate(job: Experiment, forward_passes: float, images: int) -> CardCost | None:
    """Return what a run would take on the measured card, or None where nothing is known of it.

    Args:
        job: the experiment.
        forward_passes: of the fit, of one image through the float network; 0 if it is done.
        images: that are still to be sampled.
    """
    cards = assets.read_yaml(assets.configs() / "cards.yaml")
    if not cards or not job.fit.options.fits_network:
        return None
    card, rates = next(iter(cards.items()))

    # 1. The network that was measured, and how much larger this one is.
    name = "ddim_cifar10" if job.model.codec is None else "ldm_churches"
    known = rates[name]
    share = multiplications(job) / known["multiplications"]
    measured = share == 1
    if share < SMALLEST:
        return None

    # 2. The fit: a training, or forward passes of the float network.
    options: Any = job.fit.options
    precision, form = getattr(options, "precision", "float32"), form_of(job)
    trains = options.trains_on_images
    if not forward_passes:
        fit = 0.0
    elif trains:
        fit = options.updates * options.batch_size * _rate(known["train"], precision, form)
    else:
        fit = forward_passes * _rate(known["denoise"], "float32", FLOAT)

    # 3. The images.
    step = _rate(known["denoise"], "float32", form)
    sample = images * (job.sampling.steps * step + known["decode"])

    # 4. Memory, where a batch of the measured size is computed as it was there.
    launcher = job.machine.launcher
    memory = None
    same = (
        launcher.micro_batches == 1 and not launcher.recompute and launcher.nproc in ("auto", "1")
    )
    if trains and measured and same and options.batch_size == known["batch"]:
        memory = known["memory_gb"].get(precision, {}).get(form)

    sample_gb = None
    if images and measured and known.get("sampling"):
        sample_gb = _sampling_gb(known["sampling"], form, min(job.sampling.batch, images))

    singly = bool(trains and fit and not known["train_recorded"])
    seconds = fit * share, sample * share
    return CardCost(card, precision, *seconds, memory, measured, singly, sample_gb)


def _sampling_gb(known: Mapping[str, Any], form: str, batch: int) -> float:
    """Return the memory of sampling; a decoder's does not depend on the batch that is sampled."""
    batches = batch / known["batch"]
    return float(max(known["memory_gb"][form] * batches, known["decode_gb"]))


def multiplications(job: Experiment) -> int:
    """Return those of one image's forward pass through the float network, counted once for each."""
    key = json.dumps(job.part("model"), sort_keys=True)
    if key not in _COUNTED:
        _COUNTED[key] = _counted(job)
    return _COUNTED[key]


def _counted(job: Experiment) -> int:
    model = job.model
    condition = model.draw_condition(0, Stream.IMAGE, range(1))

    # Shapes alone: nothing is computed.
    with torch.device("meta"):
        net = model.build().eval()
        x, t = torch.empty(1, *model.sample_shape), torch.zeros(1, dtype=torch.long)
        if condition is not None:
            condition = condition.to("meta")
        counted = products(net, lambda: model.predict(net, x, t, condition))
    return sum(count for count, _ in counted.values())


def form_of(job: Experiment) -> str:
    """Return which of the measured forms is nearest to a run's network."""
    if job.recipe is None:
        return FLOAT
    return STATIC if job.recipe.intervals.constant else TEMPORAL


def _rate(rates: Mapping[str, Mapping[str, float]], precision: str, form: str) -> float:
    """Return the seconds of an image; those of float32 where a precision was not measured."""
    return float(rates.get(precision, rates["float32"])[form])
