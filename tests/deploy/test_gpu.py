"""Integer layers for GPUs: on a CPU by single operations, and on a GPU by their kernels."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tdq_exp.data.arrays import ImageStore
from tdq_exp.deploy import choose, gpu, integer, stopwatch
from tdq_exp.diffusion.ddim import Ddim
from tdq_exp.diffusion.denoising_graph import DenoisingGraph
from tdq_exp.diffusion.draws import image_generators, starting_noise
from tdq_exp.diffusion.schedule import Schedule
from tdq_exp.experiment import engines
from tdq_exp.models.resnet_blocks import unet_chains
from tdq_exp.quant.chains import Chains
from tdq_exp.quant.convert import Recipe, bake
from tdq_exp.quant.grid import Grid
from tdq_exp.quant.intervals.base import LookupTable
from tdq_exp.quant.intervals.dynamic import DynamicIntervals
from tdq_exp.quant.intervals.temporal import TemporalIntervals
from tdq_exp.quant.kernels import integer_operators as kernel
from tdq_exp.quant.layers import CodedWeight, QuantConv2d, QuantLayer
from tdq_exp.quant.rules.lsq import Lsq
from tdq_exp.quant.rules.minmax import MinMax, MinMaxWeights
from tdq_exp.quant.time import TimeContext
from tdq_exp.quant.zero_point import TableZeroPoint
from tdq_exp.runtime import files
from tdq_exp.runtime.precision import products
from tdq_exp.runtime.processes import Processes
from tests.quant.builders import inputs, load_model, make_net, randn

CHANNELS = {"weight_interval": "channel_range"}
RECIPES = {
    "4 bits": lambda: Recipe(4, 4, Lsq, Lsq, TemporalIntervals(encoding=16, width=8)),
    "8 bits, affine": lambda: Recipe(
        8, 8, MinMaxWeights, Lsq, TemporalIntervals(encoding=16, width=8), **CHANNELS
    ),
    "8 bits, read from each sample": lambda: Recipe(
        8, 8, MinMaxWeights, MinMax, DynamicIntervals(per_sample=True), **CHANNELS
    ),
    "4 bits, read from the batch": lambda: Recipe(
        4, 4, Lsq, Lsq, DynamicIntervals(per_sample=False)
    ),
}
TIMES = (0, 999)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@lru_cache
def baked(name: str) -> nn.Module:
    """A baked network of a recipe; shared, and not changed."""
    return bake(make_net(RECIPES[name]()))


@pytest.fixture
def as_on_gpu(monkeypatch):
    """A network on a CPU is chosen as on a GPU; its layers compute by single operations."""
    monkeypatch.setattr(integer, "runs_on_gpu", lambda net: True)
    monkeypatch.setattr(choose, "runs_on_gpu", lambda net: True)
    monkeypatch.setattr(integer, "unavailable", lambda device: None)


def run(net: nn.Module, t: int, device: str = "cpu") -> torch.Tensor:
    """What a network answers."""
    with torch.no_grad():
        return net(inputs(3)[0].to(device), torch.tensor(t, device=device)).sample


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_layer_gives_what_the_simulated_one_gives(name, device, as_on_gpu):
    net = baked(name) if device == "cpu" else bake(make_net(RECIPES[name]())).to(device)
    layers = integer.candidates(net)
    assert all(isinstance(layer, gpu.GpuLayer) for layer in layers.values())
    assert integer.left_out(net) == {}

    def compare(key: str):
        def hook(module: nn.Module, args: tuple, y: torch.Tensor) -> None:
            x, made = args[0], layers[key]
            if made.coder is None:  # q, k and v: x is quantized, and its codes are those of x
                reader = net.get_submodule(key.rpartition(".")[0]).processor.input_quantizer
                x = gpu.gpu_coder_of(reader)(x)
            found = made(x)
            assert found.shape == y.shape
            assert float((found - y).abs().max()) <= close * float(y.abs().max()), key
            compared.add(key)

        return hook

    compared: set[str] = set()
    close = 2e-6 if device == "cpu" else 5e-5  # a GPU may add by Winograd's formulas
    handles = [net.get_submodule(key).register_forward_hook(compare(key)) for key in layers]
    try:
        with products("float32"):
            for t in TIMES:
                run(net, t, device)
    finally:
        for handle in handles:
            handle.remove()
    assert compared == {n for n, m in net.named_modules() if isinstance(m, QuantLayer)}


@pytest.mark.skipif(
    integer.unavailable(torch.device("cpu")) is not None,
    reason=str(integer.unavailable(torch.device("cpu"))),
)
def test_a_whole_network_gives_what_the_cpus_engine_gives(monkeypatch):
    """At 3 bits no sum of this net lies on the border of two codes: later layers see the same."""
    net = bake(make_net(Recipe(3, 3, Lsq, Lsq, TemporalIntervals(encoding=16, width=8))))
    on_cpu = integer.integerize(net, unet_chains(net))
    monkeypatch.setattr(integer, "runs_on_gpu", lambda net: True)
    whole = integer.integerize(net, unet_chains(net))
    assert any(isinstance(module, gpu.GpuLayer) for module in whole.modules())
    assert not any(isinstance(module, QuantLayer) for module in whole.modules())
    for t in TIMES:
        torch.testing.assert_close(run(whole, t), run(on_cpu, t), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run(whole, t), run(net, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "zero"), [(4, 0), (4, 15), (8, 0), (8, 200)])
def test_the_border_is_the_code_of_zero(bits, zero, device):
    time = TimeContext(10)
    quantizer = Lsq(
        Grid(bits, symmetric=False),
        LookupTable(torch.full((10,), 0.1), time),
        TableZeroPoint(torch.full((10,), float(zero)), time),
    ).eval()
    codes = torch.randint(-7, 8, (9, 6, 3, 3), generator=torch.Generator().manual_seed(1))
    conv = nn.Conv2d(6, 9, 3, stride=2, padding=1)
    layer = QuantConv2d(conv, CodedWeight(codes.to(torch.int8), torch.tensor(0.05)), quantizer)
    layer.to(device)
    x = randn(2, 6, 8, 7).to(device)
    with torch.no_grad(), products("float32"), time.at(torch.tensor(3, device=device)):
        made = gpu.GpuLayer(layer, gpu.gpu_coder_of(quantizer))
        torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)

        # In integers: the same weights with a step size and a scale of 1.
        coded = made.coder(x)
        assert (coded.z is None) == (bits == 4)
        q = coded.codes.double() - (0.0 if coded.z is None else zero - 128)
        sums = nn.functional.conv2d(q, codes.double().to(device), stride=2, padding=1)
        assert torch.equal(made.product(coded, torch.int32).double(), sums)


def test_what_the_kernels_can_not_take_stays_simulated_and_says_why(as_on_gpu, monkeypatch):
    net = baked("4 bits")
    monkeypatch.setattr(kernel, "MOST_PRODUCTS", 200)
    found, left = integer.candidates(net), integer.left_out(net)
    assert found and left and found.keys().isdisjoint(left)
    assert set(left.values()) == {"its sums are of more than 200 products"}
    name = next(iter(left))
    with pytest.raises(ValueError, match=rf"{name}: can't run on codes here: its sums are"):
        integer.integerize(net, unet_chains(net), [name])

    groups = QuantConv2d(
        nn.Conv2d(4, 4, 3, groups=2),
        CodedWeight(torch.ones(4, 2, 3, 3).char(), torch.ones(())),
        None,
    )
    assert gpu.reason_against(groups) == "it has groups"


def test_a_batch_of_several_time_steps_is_refused(as_on_gpu):
    whole = integer.integerize(baked("4 bits"), unet_chains(baked("4 bits")))
    with pytest.raises(ValueError, match="one time step for the whole batch"):
        whole(*inputs(2))


def test_a_device_that_can_not_says_why(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(kernel, "used", lambda device: "fused: triton")
    assert "need compute capability 8.0, and this GPU has 7.5" in str(integer.unavailable(device))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert integer.unavailable(device) is None
    monkeypatch.setattr(kernel, "used", lambda device: "unfused: no triton: nowhere")
    assert "no triton: nowhere" in str(integer.unavailable(device))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in str(integer.unavailable(device))
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="engine=integer: there are no integer kernels"):
            integer.integerize(copy.deepcopy(baked("4 bits")).to("meta"), Chains())


class Watch:
    """In the stopwatch's place: seconds that are set beforehand.

    Args:
        layer: of a layer's forms, by name; `simulated` is 1.
        step: of the whole network's integer form.
        failed: a layer's forms that fail, and how.
        step_failed: the whole network's.
    """

    CALLS, in_one_line = stopwatch.CALLS, staticmethod(stopwatch.in_one_line)

    def __init__(
        self,
        layer: dict[str, float],
        step: float,
        failed: dict[str, str],
        step_failed: dict[str, str] | None = None,
    ) -> None:
        self.layer, self.step = {"simulated": 1.0, **layer}, {"simulated": 1.0, "integer": step}
        self.failed, self.step_failed = failed, step_failed or {}

    def medians(self, calls, device, together=1):
        """As `stopwatch.medians`; each call is made once."""
        for call in calls.values():
            assert isinstance(call(), torch.Tensor)
        whole = "integer" in calls
        assert together == (1 if whole else self.CALLS)
        times, failed = (self.step, self.step_failed) if whole else (self.layer, self.failed)
        return {name: times.get(name, 2.0) for name in calls if name not in failed}, failed


LARGE = {"integer": "OutOfMemoryError: of both networks"}
NO_FLOATS = {"simulated": "RuntimeError: waits for the GPU"}
FAST = {"integer 1": 0.5}


@pytest.mark.parametrize(
    ("watch", "taken", "said", "printed"),
    [
        (Watch(FAST, 0.8, {"integer 0": "too large"}), True, "", "800.000 ms with integers"),
        (Watch(FAST, 1.2, {}), False, "2.00 times as fast", "integers are not faster"),
        (Watch({}, 0.5, {}), False, "0.50 times as fast", ""),
        (
            Watch({}, 0.5, {f"integer {i}": "out of resources" for i in range(5)}),
            False,
            "out of",
            "",
        ),
        (Watch(FAST, 0.5, NO_FLOATS), False, "its simulated form ended with RuntimeError", ""),
        (Watch(FAST, 0.5, {}, LARGE), False, "OutOfMemoryError", "integers ended with OutOfMem"),
        (Watch(FAST, 0.5, {}, NO_FLOATS), True, "", "a simulated step ended with RuntimeError"),
        (Watch(FAST, 0.5, {}, LARGE | NO_FLOATS), False, "OutOfMemoryError", "not timed; quant"),
    ],
    ids=[
        *("faster", "whole step slower", "layers slower", "no tile fits", "no simulated layer"),
        *("no integer step", "no simulated step", "no step"),
    ],
)
def test_the_engine_takes_the_fastest_tile_or_none(
    watch, taken, said, printed, as_on_gpu, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(choose, "stopwatch", watch)
    net, step = baked("4 bits"), step_of_the_tiny_net
    kept = choose.Kept(tmp_path / "engine.json")
    found = choose.choice(net, step, 1.0, kept, unet_chains(net))
    assert choose.choice(net, step, 1.0, kept, unet_chains(net)) == files.read_json(kept.file)
    out = " ".join(capsys.readouterr().out.split())
    assert ("a whole step: " in out) == ("step" in found) == bool(printed)
    assert printed in out
    if taken:
        assert len(found["layers"]) == found["of"] and found["simulated"] == {}
        assert {tuple(tile) for tile in found["tiles"].values()} == {kernel.TILES[1]}
        whole = integer.integerize(net, unet_chains(net), found["layers"], found["tiles"])
        tiles = {tuple(m.tile) for m in whole.modules() if isinstance(m, gpu.GpuLayer)}
        assert tiles == {kernel.TILES[1]}
    else:
        assert found["layers"] == [] and len(found["simulated"]) == found["of"]
        assert all(said in reason for reason in found["simulated"].values())


def step_of_the_tiny_net(net: nn.Module) -> torch.Tensor:
    """A forward pass as the engine makes it, of two images."""
    return load_model("tiny").predict(net, inputs(2)[0], torch.tensor(500))


def test_one_input_of_a_shape_is_kept(monkeypatch):
    """Those of all layers at once may be more than a GPU's memory."""
    shown: dict[str, weakref.ref[torch.Tensor]] = {}
    alive: list[int] = []

    def medians(calls, device, together) -> tuple[dict[str, float], dict[str, str]]:
        alive.append(sum(x() is not None for x in shown.values()))
        return dict.fromkeys(calls, 1.0), {}

    def note(name: str):
        return lambda module, args: shown.update({name: weakref.ref(args[0])})

    net = copy.deepcopy(baked("4 bits"))
    for name, module in net.named_modules():
        if isinstance(module, QuantLayer):
            module.register_forward_pre_hook(note(name))
    monkeypatch.setattr(choose.stopwatch, "medians", medians)
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: x)  # what is kept is what was shown
    times = choose.timed(net, step_of_the_tiny_net)
    assert alive[0] <= len(times) < len(shown) / 2
    assert sum(len(entry.names) for entry in times) == len(shown)


def test_two_networks_that_do_not_fit_leave_the_first(as_on_gpu, monkeypatch, tmp_path):
    def too_large(*arguments) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(choose, "stopwatch", Watch(FAST, 0.5, {}))
    monkeypatch.setattr(choose, "integerize", too_large)
    net, kept = baked("4 bits"), choose.Kept(tmp_path / "engine.json")
    found = choose.choice(net, step_of_the_tiny_net, 1.0, kept, unet_chains(net))
    assert found["layers"] == [] and found["failed"]["integer"].endswith("CUDA out of memory")


@pytest.mark.parametrize(
    ("least", "step", "taken"),
    [(2.0, 0.6, True), (2.0, 1.1, False), (0.5, 1.5, True), (0, 9, True)],
)
def test_the_least_gain_is_of_a_layer_and_the_whole_only_must_not_lose(
    least, step, taken, as_on_gpu, monkeypatch, tmp_path
):
    monkeypatch.setattr(choose, "stopwatch", Watch({"integer 1": 0.4}, step, {}))
    net, kept = baked("4 bits"), choose.Kept(tmp_path / "engine.json")
    found = choose.choice(net, step_of_the_tiny_net, least, kept, unet_chains(net))
    assert bool(found["layers"]) is taken


def test_the_sample_stage_names_the_layers_that_ran(as_on_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(choose, "stopwatch", Watch({"integer 0": 0.5}, 0.5, {}))
    images = engines.ImageSet(tmp_path, ImageStore(tmp_path / "images", 2, 2, (8, 8, 1)))
    net, name = engines.engine(
        baked("4 bits"), load_model("tiny"), "integer", images, Processes(cpu=True)
    )
    count = sum(isinstance(module, gpu.GpuLayer) for module in net.modules())
    assert name == f"integer: {count} of {count} layers"


def test_the_clock_of_a_cpu_lets_errors_pass():
    def wrong() -> torch.Tensor:
        raise RuntimeError("no such layer")

    seconds, failed = stopwatch.medians({"a": lambda: torch.zeros(())}, torch.device("cpu"))
    assert seconds["a"] > 0 and failed == {}
    with pytest.raises(RuntimeError, match="no such layer"):
        stopwatch.medians({"a": wrong}, torch.device("cpu"))


class Card:
    """In torch.cuda's place: the current device, its events, and recordings of calls."""

    def __init__(self) -> None:
        self.current: torch.device | None = None
        self.calls: list[str] = []  # while recording
        self.replayed = 0  # calls, while replaying

    def call(self, name: str) -> torch.Tensor:
        """What is recorded; b can't be."""
        if name == "b":
            raise MemoryError("out of shared memory\nand more")
        self.calls.append(name)
        return torch.zeros(())

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """As `torch.cuda.device`."""
        self.current = device
        yield
        self.current = None

    def event(self, enable_timing: bool) -> SimpleNamespace:
        """As `torch.cuda.Event`; a call takes 3 ms."""
        event = SimpleNamespace(synchronize=list)

        def record() -> None:
            assert self.current == torch.device("cuda:1")
            event.at = self.replayed

        event.record = record
        event.elapsed_time = lambda other: 3.0 * (other.at - event.at)
        return event

    def recorded(self, function, device: torch.device) -> Recording:
        """As `Recorded`."""
        return Recording(self, function)


class Recording:
    """Calls a function to record it, and then only counts."""

    def __init__(self, card: Card, function) -> None:
        self.card, self.function, self.prepare = card, function, list

    def record(self) -> None:
        """As `Recorded.record`."""
        before = len(self.card.calls)
        self.function()
        self.count = len(self.card.calls) - before

    def __call__(self) -> None:
        self.card.replayed += self.count


@pytest.mark.parametrize("together", [1, stopwatch.CALLS])
def test_what_can_not_be_recorded_is_named_and_the_rest_is_timed(together, monkeypatch):
    card = Card()
    monkeypatch.setattr(stopwatch, "Recorded", card.recorded)
    monkeypatch.setattr(torch.cuda, "device", card.device)
    monkeypatch.setattr(torch.cuda, "Event", card.event)
    calls = {name: partial(card.call, name) for name in "abc"}
    seconds, failed = stopwatch.medians(calls, torch.device("cuda:1"), together)
    assert card.calls == ["a"] * together + ["c"] * together, "so many calls in one recording"
    assert seconds == pytest.approx({"a": 0.003, "c": 0.003})
    assert failed == {"b": "MemoryError: out of shared memory"}


def test_a_compiled_network_sees_operators(as_on_gpu):
    """Every layer, coder and fused norm is one operator in a recorded graph of operations."""
    net = baked("4 bits")
    whole = integer.integerize(net, unet_chains(net))
    x, t = inputs(2)[0], torch.tensor(500)
    exported = torch.export.export(Answer(whole), (x, t), strict=False)
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    layers = sum(isinstance(module, gpu.GpuLayer) for module in whole.modules())
    assert sum("integer_product" in name for name in called) == layers
    assert any("norm_codes" in name for name in called)
    assert not any(".item" in name or "local_scalar" in name for name in called)
    with torch.no_grad():
        assert torch.equal(exported.module()(x, t), whole(x, t).sample)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_no_number_comes_out_as_none(name, as_on_gpu):
    """Bytes have no NaN: without a sign of it a network that has diverged gives images."""
    net = baked(name)
    whole = integer.integerize(net, unet_chains(net))
    x = inputs(2)[0]
    with torch.no_grad():
        assert bool(whole(x, 500, return_dict=False)[0].isfinite().all())
        x[1, 0, 3, 3] = float("nan")
        assert bool(whole(x, 500, return_dict=False)[0][1].isnan().all())


class Answer(nn.Module):
    """A network that answers a tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The tensor."""
        return self.net(x, t, return_dict=False)[0]


# What only a GPU has.


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_a_recorded_step_gives_the_eager_loops_bits_and_follows_t(name):
    net = bake(make_net(RECIPES[name]())).cuda()
    whole = integer.integerize(net, unet_chains(net))

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return whole(x, t, return_dict=False)[0]

    ddim, graph = Ddim(20), DenoisingGraph(Ddim(20))
    x = starting_noise(image_generators(0, range(3)), (1, 8, 8)).cuda()
    with torch.no_grad():
        wanted = ddim.sample(denoise, x, Schedule())
        found = graph.sample(denoise, x, Schedule())
    assert graph._steps is not None and graph._steps.step._graph is not None
    assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_a_gpu_gives_what_a_cpu_gives():
    net = bake(make_net(Recipe(3, 3, Lsq, Lsq, TemporalIntervals(encoding=16, width=8))))
    wanted = {t: run(net, t) for t in TIMES}
    net = net.cuda()
    whole = integer.integerize(net, unet_chains(net))
    for t in TIMES:  # a sum on the border of two codes may fall on either side
        apart = (run(whole, t, "cuda").cpu() - wanted[t]).abs()
        assert float(apart.median()) <= 1e-4 and float(apart.mean()) <= 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_integers_under_autocast_are_no_worse_than_simulated_quantization(
    device, as_on_gpu, monkeypatch
):
    if device == "cpu":  # layers answer in autocast's type there, too
        kernels = SimpleNamespace(
            readable=gpu.kernels.readable, result_type=lambda x: torch.bfloat16
        )
        monkeypatch.setattr(gpu, "kernels", kernels)
    net = bake(make_net(RECIPES["4 bits"]())).to(device)
    whole = integer.integerize(net, unet_chains(net))
    for t in TIMES:
        with products("float32"):
            exact = run(net, t, device)
        with torch.autocast(device, torch.bfloat16):
            simulated, integers = run(net, t, device), run(whole, t, device)
        assert simulated.dtype == integers.dtype
        of_simulated, of_integers = (
            float((y.float() - exact).abs().mean()) for y in (simulated, integers)
        )
        assert 0 < of_integers <= 2 * of_simulated


@pytest.mark.gpu
def test_autocast_gets_its_own_type():
    net = bake(make_net(RECIPES["4 bits"]())).cuda()
    layers = integer.candidates(net)
    x = randn(2, 1, 8, 8).cuda()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        run(net, 5, "cuda")
        y = layers["conv_in"](x)
    with torch.no_grad():
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, layers["conv_in"](x).bfloat16())


@pytest.mark.gpu
def test_a_compiled_network_gives_the_same_image():
    net = bake(make_net(RECIPES["4 bits"]())).cuda()
    whole = integer.integerize(net, unet_chains(net))
    x, t = inputs(3)[0].cuda(), torch.tensor(500, device="cuda")
    with torch.no_grad():
        wanted = whole(x, t, return_dict=False)[0]
        compiled = torch.compile(whole, backend="aot_eager")
        assert torch.equal(compiled(x, t, return_dict=False)[0], wanted)


@pytest.mark.gpu
def test_the_choice_is_measured_in_graphs(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "TILES", kernel.TILES[2:4])  # each is compiled for every kind
    net, model = bake(make_net(RECIPES["4 bits"]())).cuda(), load_model("tiny")
    x, t = inputs(2)[0].cuda(), torch.tensor(500, device="cuda")
    kept = choose.Kept(tmp_path / "engine.json")
    found = choose.choice(net, lambda n: model.predict(n, x, t), 0.0, kept, unet_chains(net))
    assert len(found["layers"]) == found["of"]
    assert all(entry["error"] is None and entry["integer"] > 0 for entry in found["shapes"])
    assert found["step"]["integer"] > 0
