"""A network that takes a condition: the label that reaches it is that of its own sample, in every stage.

The schedule adds next to no noise, so each x_t still shows which image, or which starting noise, it
comes from; the network itself compares the label that it is given with the one of that image.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tdq_exp.config.compose import compose
from tdq_exp.data.images import Images
from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.diffusion.draws import Stream, draw_batch, image_generators, starting_noise
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline
from tdq_exp.fit.calibration_options import CalibrationSpec
from tdq_exp.fit.losses import batch_loss
from tdq_exp.fit.ptq import calibration_set
from tdq_exp.fit.ptq.reconstruct import Reconstruction
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.models.weights.fill import save_weights
from tdq_exp.quant.roles import Role

CLASSES = 10
SHAPE = (1, 8, 8)
QUICK = ["model=tiny", "tracker=none", "launcher=cpu", "protocol.qat.calibration_samples=64"]


@dataclasses.dataclass
class Pairs:
    """What every x_t comes from, and the label that belongs to it.

    Args:
        x: images and starting noises, `[N, 64]`.
        labels: `[N]`.
        checked: labels that were compared so far.
    """

    x: Tensor
    labels: Tensor
    checked: list[int] = dataclasses.field(default_factory=list)

    def check(self, x_t: Tensor, labels: Tensor) -> None:
        """Compare the label of each sample with the one of what it comes from."""
        if x_t.is_meta or not x_t.any():
            return  # an example of an input

        distance, nearest = torch.cdist(x_t.flatten(1), self.x).min(1)
        assert float(distance.max()) < 1.0
        assert torch.equal(labels, self.labels[nearest])
        self.checked += labels.tolist()

    def __deepcopy__(self, memo: object) -> Pairs:
        return self  # copies of a network count together


class Block(nn.Module):
    """A residual block that takes x_t and the labels as tensors of their own."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.pairs = pairs
        self.embedding, self.conv = nn.Embedding(CLASSES, 4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, h: Tensor, x_t: Tensor, labels: Tensor) -> Tensor:
        self.pairs.check(x_t, labels)
        return h + self.conv(torch.relu(h + self.embedding(labels)[:, :, None, None]))


class Net(nn.Module):
    """Three convolutions and a label."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.block = Block(pairs)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True):
        return (self.conv_out(self.block(self.conv_in(x), x, class_labels)),)


class Model(DiffusionModel):
    """The description of `Net`."""

    def __init__(self, pairs: Pairs) -> None:
        network = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "num_class_embeds": CLASSES,
        }
        super().__init__(network, Schedule(1000, "linear", 1e-9, 1e-8), flip=False)
        self.pairs = pairs

    def build(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Net(self.pairs)

    def roles(self, net: nn.Module) -> dict[str, Role]:
        return {
            "conv_in": Role("first", "conv_in"),
            "conv_out": Role("last", "conv_out"),
            "block.conv": Role("conv", "block"),
        }


@pytest.fixture
def model():
    """A model that knows the digits, and what its images and trajectories start from."""
    digits = load_digits()
    x = [torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.float32)) / 127.5 - 1]
    labels, made = [torch.from_numpy(digits.target)], Model(None)

    for stream, count in ((Stream.IMAGE, 12), (Stream.TRAJECTORY, 64)):
        noise = starting_noise(image_generators(0, range(count), stream), SHAPE)
        x.append(noise)
        labels.append(made.draw_condition(0, stream, range(count)))

    made.pairs = Pairs(torch.cat([part.flatten(1) for part in x]), torch.cat(labels))
    return made


@pytest.fixture
def build(model, tmp_path):
    """Build a run of the model."""
    save_weights(model.build(seed=1), tmp_path / "net.safetensors", {})

    def run(*overrides: str) -> jobs.Experiment:
        arguments = [*QUICK, f"model.weights={tmp_path / 'net.safetensors'}", f"out={tmp_path}"]
        return dataclasses.replace(jobs.build(compose([*arguments, *overrides])), model=model)

    return run


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lsq", "tdq=temporal"],
        ["method=ptq4dm", "tdq=none"],
        ["method=ptq4dm", "tdq=temporal", "calibration=forward", "fit.memory_gb=1e-9"],
        ["method=minmax", "tdq=temporal", "fit.correction=ptqd"],
    ],
    ids=["trained", "trajectories", "noised", "over_time"],
)
@pytest.mark.usefixtures("few_start_values")
def test_each_sample_has_its_own_condition_from_the_float_net_to_the_row(
    build, model, overrides, monkeypatch
):
    # What a block is shown is compared, too: from memory, or from files.
    seen, output = [], Reconstruction.output
    monkeypatch.setattr(
        Reconstruction, "output", lambda self, index: seen.append(len(index)) or output(self, index)
    )
    made = build(*overrides)
    (row,) = pipeline.run(made)
    assert row["images"] == 12 and np.isfinite(list(row["metrics"].values())).all()
    assert set(model.pairs.checked) == set(range(CLASSES))
    assert bool(seen) == ("method=ptq4dm" in overrides)

    facts = json.loads((made.folder / "fit.json").read_text())
    assert "-" in facts["parts"]["data"]["train"]  # pixels, and labels
    assert pipeline.run(build(*overrides)) == [row]


def one_of(world: int, rank: int, decided: list[object]) -> SimpleNamespace:
    """Return a process of several that work one after the other: rank 0 decides, the rest follow."""
    earlier = iter(list(decided))

    def decide(work: Callable[[], object]) -> object:
        if rank:
            return next(earlier)
        decided.append(work())
        return decided[-1]

    return SimpleNamespace(
        sharing=nullcontext,
        rank=rank, world=world, main=not rank, device=torch.device("cpu"), decide=decide,
        barrier=lambda: None,
    )  # fmt: skip


def test_two_processes_give_each_sample_its_own_condition(model, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_set, "GROUP", 4)
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    images = Images(pixels, "digits", "none").labelled(digits.target)
    net = model.build().eval()

    # A shard of a training batch.
    draws = draw_batch(0, 3, batch_size=8, images=len(images), shape=SHAPE, steps=1000, flip=False)
    for rank in (0, 1):
        batch_loss(net, model, images, draws.shard(rank, 2), torch.device("cpu"))
    assert model.pairs.checked == digits.target[draws.index.numpy()].tolist()

    # A calibration set: groups that are dealt out, and batches across their borders.
    spec, ddim = CalibrationSpec("uniform", 24, 8), Ddim(6)
    found = []
    for world in (1, 2):
        decided: list[object] = []  # by rank 0, for all
        for rank in range(world):
            made = calibration_set.make_set(
                spec, Denoiser(net, model), ddim, None, parts={},
                cache=tmp_path / str(world), processes=one_of(world, rank, decided),
            )  # fmt: skip
        found.append(made.batch(slice(None)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))

    x, _, labels = made.batch(np.array([23, 2, 11]))
    assert torch.equal(labels, model.draw_condition(0, Stream.TRAJECTORY, range(8))[[7, 0, 3]])
    model.pairs.check(x, labels)


@pytest.mark.usefixtures("few_start_values")
def test_a_class_conditional_unet_is_a_model_by_configuration_alone(tmp_path):
    classes = "+model.definition.network.num_class_embeds=10"
    run = [*QUICK, classes, f"out={tmp_path}"]
    float_run = jobs.build(compose([*run, "method=fp", "fit=pretrain"]))
    pipeline.run(float_run)
    (row,) = pipeline.run(
        jobs.build(compose([*run, f"model.weights={float_run.folder / 'weights.safetensors'}"]))
    )
    assert row["images"] == 12

    images = Images(np.zeros((2, 8, 8, 1), np.uint8), "two", "none")
    with pytest.raises(ValueError, match="num_class_embeds=9: .* set it to at least 10"):
        pipeline.require_classes(images.labelled([0, 9, 12]), 9)
    with pytest.raises(ValueError, match="1 of 2 images have no class"):
        pipeline.require_classes(images.labelled([0, -1]), 9)
    with pytest.raises(ValueError, match="1 class labels for 2 images"):
        images.labelled([0])
