"""Sampling by replays of one recorded step gives what the eager loop gives, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tdq_exp.diffusion import denoising_graph
from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.diffusion.denoising_graph import DenoisingGraph
from tdq_exp.diffusion.draws import image_generators, starting_noise
from tdq_exp.diffusion.objective import PREDICTIONS
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.models.pixel import DiffusionModel
from tdq_exp.quant import bake
from tdq_exp.runtime.graphs import no_collection
from tests.fit.taped import Taped, record_on_tape
from tests.models.test_denoiser import CONDITIONAL
from tests.quant.builders import load_model, make_net, make_recipe, start_quickly

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SCHEDULE = Schedule()
SAMPLERS = {
    "plain": Ddim(5),
    "clipped": Ddim(5, clip=True),
    "as LDM": Ddim(5, offset=1, final_alpha_one=False),
    "quadratic": Ddim(7, "quad"),
    "stochastic": Ddim(5, eta=1.0),
    "stochastic, clipped": Ddim(5, eta=0.5, clip=True),
}


def denoise(x: Tensor, t: Tensor) -> Tensor:
    """Something of x and t that forgets neither."""
    return torch.tanh(x + 0.3) * (1 + t / 1000)


def start(device: str = "cpu", seed: int = 0) -> tuple[Tensor, list[torch.Generator]]:
    """(x_T, one generator per image), of three images."""
    generators = image_generators(seed, range(3))
    return starting_noise(generators, (1, 8, 8)).to(device), generators


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_recorded_step_has_the_bits_of_the_eager_one(name):
    ddim, (x, generators) = SAMPLERS[name], start()
    wanted = ddim.sample(denoise, x, SCHEDULE, generators)

    x, generators = start()
    steps = denoising_graph.RecordedSteps(ddim, denoise, x, SCHEDULE)  # runs, unrecorded, on a CPU
    steps.record()
    assert torch.equal(steps.run(x, generators, None), wanted)


def test_each_batch_starts_anew_and_sees_every_step():
    ddim, seen = SAMPLERS["plain"], []
    steps = denoising_graph.RecordedSteps(ddim, denoise, start()[0], SCHEDULE)
    for seed in (1, 2):
        x, generators = start(seed=seed)
        seen.clear()
        found = steps.run(x, generators, lambda t, x_t: seen.append((t, x_t)))
        assert torch.equal(found, ddim.sample(denoise, x, SCHEDULE))
        assert [t for t, _ in seen] == [t for t, _ in ddim.pairs(SCHEDULE)]
        assert torch.equal(seen[0][1], x) and not torch.equal(seen[0][1], seen[1][1])


def test_without_a_gpu_it_is_the_sampler_itself():
    x, generators = start()
    found = DenoisingGraph(SAMPLERS["stochastic"]).sample(denoise, x, SCHEDULE, generators)
    x, generators = start()
    assert torch.equal(found, SAMPLERS["stochastic"].sample(denoise, x, SCHEDULE, generators))


@pytest.mark.parametrize("device", DEVICES)
def test_batches_of_conditions_share_a_recording(device, monkeypatch):
    """One for each shape of batch, of which one is kept; the conditions that are given stay."""
    if device == "cpu":
        record_on_tape(monkeypatch)
    recorded, record = [], denoising_graph.RecordedSteps.record

    def counted(steps: denoising_graph.RecordedSteps) -> None:
        recorded.append(len(steps.x))
        record(steps)

    monkeypatch.setattr(denoising_graph.RecordedSteps, "record", counted)
    model = DiffusionModel(CONDITIONAL, SCHEDULE)
    net = model.build(seed=1).to(device).eval()
    ddim, graph = SAMPLERS["plain"], DenoisingGraph(SAMPLERS["plain"])
    given, x = [], start(device)[0][..., :4, :4].contiguous()
    for classes in ([0, 1, 2], [2, 2, 0], [1, 0, 1], [1]):
        labels = torch.tensor(classes, device=device)
        denoiser = Denoiser(net, model).conditioned(labels, labels.device)
        found = graph.sample(denoiser, x[: len(labels)], SCHEDULE)
        with torch.no_grad():
            assert torch.equal(found, ddim.sample(denoiser, x[: len(labels)], SCHEDULE))
        given.append((labels, classes))

    assert recorded == [3, 1] and graph._steps is not None
    assert all(labels.tolist() == classes for labels, classes in given)
    if device == "cpu":
        assert len(Taped.alive) == Taped.released == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_step_of_every_prediction_is_recorded(kind, device, monkeypatch):
    """Of a baked network with TDQ: nothing reads t on the host."""
    if device == "cpu":
        record_on_tape(monkeypatch)
    model = load_model("tiny")
    model.prediction_type = kind
    net = model.build(seed=1)
    model.quantize(net, make_recipe("lsq", "temporal"))
    start_quickly(net)
    denoiser = Denoiser(bake(net).to(device).eval(), model)

    x = start(device)[0]
    graph = DenoisingGraph(SAMPLERS["plain"])
    found = graph.sample(denoiser, x, SCHEDULE)
    assert graph._steps is not None
    with torch.no_grad():
        assert torch.equal(found, SAMPLERS["plain"].sample(denoiser, x, SCHEDULE))


def test_a_sampler_that_nobody_holds_frees_its_recording(monkeypatch):
    record_on_tape(monkeypatch)
    with no_collection():
        graph = DenoisingGraph(SAMPLERS["stochastic"])
        x, generators = start()
        graph.sample(denoise, x, SCHEDULE, generators)
        assert Taped.alive
        del graph
        assert not Taped.alive


def test_without_memory_for_a_recording_sampling_ends(monkeypatch):
    record_on_tape(monkeypatch)
    graph, x = DenoisingGraph(SAMPLERS["plain"]), start()[0]
    graph.sample(denoise, x, SCHEDULE)

    def fail(taped: Taped) -> None:
        assert not Taped.alive, "the earlier recording is still there"
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Taped, "prepare", fail)
    for _ in range(2):  # and is tried again
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            graph.sample(denoise, x[:2], SCHEDULE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_on_a_gpu_replays_give_the_eager_loops_bits(name):
    ddim, (x, generators) = SAMPLERS[name], start("cuda")
    wanted = ddim.sample(denoise, x, SCHEDULE, generators)
    graph = DenoisingGraph(ddim)
    for _ in range(2):
        x, generators = start("cuda")
        assert torch.equal(graph.sample(denoise, x, SCHEDULE, generators), wanted)
    assert graph._steps is not None


@pytest.mark.gpu
@pytest.mark.parametrize("interval", ["static", "temporal"])
def test_a_baked_network_is_recorded_and_gives_the_same_images(interval):
    net = bake(make_net(make_recipe("lsq", interval))).cuda()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, return_dict=False)[0]

    ddim = replace(SAMPLERS["plain"], steps=20)
    graph = DenoisingGraph(ddim)
    x, _ = start("cuda")
    with torch.no_grad():
        wanted = ddim.sample(predict, x, SCHEDULE)
    found = graph.sample(predict, x, SCHEDULE)
    assert graph._steps is not None
    assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_sampled_step_by_step_and_said():
    def waits(x: Tensor, t: Tensor) -> Tensor:
        return denoise(x, t) * (1 + int(t) / 1e6)

    x, _ = start("cuda")
    graph = DenoisingGraph(SAMPLERS["plain"])
    with pytest.warns(UserWarning, match="step by step"):
        found = graph.sample(waits, x, SCHEDULE)
    assert torch.equal(found, SAMPLERS["plain"].sample(waits, x, SCHEDULE))
