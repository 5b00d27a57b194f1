"""The public functions for people with a network and a training loop of their own."""

from __future__ import annotations

import copy
import io
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from hydra.core.global_hydra import GlobalHydra

import tdq_exp
from tdq_exp.fit import correction as corrections
from tdq_exp.models.pixel import set_heads
from tdq_exp.quant.convert import activation_quantizers
from tests.quant.builders import load_model

README = Path(__file__).parents[2] / "README.md"


def unet():
    """A network of other widths than any of ours."""
    torch.manual_seed(0)
    options = {**load_model("tiny").network, "block_out_channels": (4, 8), "norm_num_groups": 2}
    return UNet2DModel(**options)


def batch(seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 999, size).long()
    return torch.randn(size, 1, 8, 8, generator=generator), t


def readme_example():
    """The block of README's section, as code."""
    section = README.read_text().split("## Your own network and training loop")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    eps = torch.randn(4, 1, 8, 8)
    monkeypatch.setattr(corrections, "IMAGES", 1)
    given = {"unet": unet(), "batches": [batch(1), batch(2)], "loader": [(*batch(3), eps)]}
    given["images"] = torch.zeros(3, 1, 8, 8)
    before = copy.deepcopy(given["unet"].state_dict())
    exec(readme_example(), given)

    trained, loaded = given["net"], tdq_exp.load("net.safetensors")
    x, t = batch(5)
    with torch.no_grad():
        assert torch.equal(loaded(x, t).sample, trained.eval()(x, t).sample)

    # The user's own network is as it was.
    after = given["unet"].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("method", ["nipq", "minmax"])
def test_other_methods_give_networks_that_are_saved_and_come_back(method, tmp_path):
    theirs = GlobalHydra.instance().hydra
    net = tdq_exp.quantize(unet(), bits="w8a5", method=method, tdq="s10", plan="edge8")
    assert GlobalHydra.instance().hydra is theirs
    tdq_exp.calibrate(net, [batch()])

    twin = copy.deepcopy(net)
    assert tdq_exp.save(twin, tmp_path / "net.safetensors") > 0
    loaded = tdq_exp.load(tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(*batch(5)).sample, net(*batch(5)).sample)


@pytest.mark.parametrize(("method", "over_time"), [("lsq", True), ("minmax", False)])
def test_a_method_that_is_not_trained_has_static_step_sizes_unless_asked(method, over_time):
    net = tdq_exp.quantize(unet(), method=method)
    found = {q.interval.time_dependent for q in activation_quantizers(net).values()}
    assert found == {over_time} and net.tdq_config["tdq"]["label"] == ("tdq" if over_time else "")


def test_a_corrected_network_is_saved_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(corrections, "IMAGES", 2)
    source = unet()
    net = tdq_exp.quantize(source, bits="w3a3")
    tdq_exp.calibrate(net, [batch()])
    plain, images = copy.deepcopy(net), torch.rand(5, 1, 8, 8) * 2 - 1
    facts = tdq_exp.correct(net.train(), source, images)
    assert net.training and -0.5 <= facts["k_min"] <= facts["k_max"] < 0.5

    x, t = batch(5)
    k, bias = net.correction.k[t], net.correction.bias[t]
    assert bool((k != 0).any()) and bool((bias != 0).any())
    with torch.no_grad():
        expected = plain(x, t).sample / (1 + k[:, None, None, None]) - bias[:, :, None, None]
        assert torch.equal(net.eval()(x, t).sample, expected)
        tdq_exp.save(net, tmp_path / "net.safetensors")
        assert torch.equal(tdq_exp.load(tmp_path / "net.safetensors")(x, t).sample, expected)


def test_a_correction_is_measured_without_dropout_and_leaves_both_networks_in_their_mode(
    monkeypatch,
):
    monkeypatch.setattr(corrections, "IMAGES", 1)
    found = []
    for training in (False, True):
        torch.manual_seed(0)
        source = UNet2DModel(**{**dict(unet().config), "dropout": 0.5}).train(training)
        net = tdq_exp.quantize(source.eval())
        tdq_exp.calibrate(net, [batch()])
        tdq_exp.correct(net.train(training), source.train(training), torch.zeros(2, 1, 8, 8))
        assert net.training is source.training is training
        found.append(net.correction.bias)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rule": "qncd"}, "rule='qncd': choose one of ptqd, rescale"),
        ({"images": torch.full((2, 1, 8, 8), 255.0)}, r"images must be in \[-1, 1\]"),
        ({"images": torch.zeros(2, 3, 8, 8)}, r"wanted \['N', 1, 8, 8\]"),
        ({"images": [1, 2]}, "must be a float32 tensor"),
        ({"classes": torch.zeros(2)}, "takes no classes"),
        ({"float_net": "itself"}, "is a quantized network"),
        ({"float_net": "other"}, "its block_out_channels is"),
    ],
)
def test_what_can_not_be_corrected_is_one_line(change, message):
    source = unet()
    net = tdq_exp.quantize(source)
    tdq_exp.calibrate(net, [batch()])
    other = UNet2DModel(**{**load_model("tiny").network, "block_out_channels": (8, 8)})
    given = {"net": net, "float_net": source, "images": torch.zeros(2, 1, 8, 8), **change}
    given["float_net"] = {"itself": net, "other": other}.get(change.get("float_net"), source)
    with pytest.raises(ValueError, match=message):
        tdq_exp.correct(**given)
    assert "correction" not in dict(net.named_children())


def test_a_network_is_corrected_once_and_before_it_is_baked(monkeypatch):
    monkeypatch.setattr(corrections, "IMAGES", 1)
    source, images = unet(), torch.zeros(2, 1, 8, 8)
    net = tdq_exp.quantize(source)
    with pytest.raises(ValueError, match="call tdq_exp.calibrate"):
        tdq_exp.correct(net, source, images)
    tdq_exp.calibrate(net, [batch()])
    with pytest.raises(ValueError, match="is baked"):
        tdq_exp.correct(tdq_exp.bake(net), source, images)
    tdq_exp.correct(net, source, images)
    with pytest.raises(ValueError, match="corrected already"):
        tdq_exp.correct(net, source, images)
    for change in (
        lambda: tdq_exp.calibrate(net, [batch()]),
        lambda: tdq_exp.parameter_groups(net, lr=1e-4),
    ):
        with pytest.raises(ValueError, match="corrected already; calibrate and train it before"):
            change()


def test_every_parameter_is_in_one_group_and_the_rates_are_as_asked():
    net = tdq_exp.quantize(unet())
    groups = {group["name"]: group for group in tdq_exp.parameter_groups(net, lr=1e-3)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "weights": 1e-3, "step_sizes": 1e-4, "zero_points": 1e-3, "generators": 1e-3
    }  # fmt: skip
    counted = sum(p.numel() for group in groups.values() for p in group["params"])
    assert counted == sum(p.numel() for p in net.parameters())
    assert float(tdq_exp.penalty(net)) == 0


def test_a_penalty_is_that_of_the_last_pass_and_those_of_several_passes_add_up():
    torch.manual_seed(0)
    net = tdq_exp.quantize(unet(), method="pact")
    x, _ = batch()
    tdq_exp.calibrate(net, [batch()])
    net.train()
    times = [torch.tensor(steps) for steps in ([1, 2, 3, 4], [900, 901, 902, 903])]

    def penalties(*passes):
        """The penalty after each pass, and the gradient of their sum."""
        found = []
        for t in passes:
            net(x, t)
            found.append(tdq_exp.penalty(net))
        return found, torch.autograd.grad(sum(found), net.generators.bias0)[0]

    (first,), of_first = penalties(times[0])
    (second,), of_second = penalties(times[1])
    both, of_both = penalties(*times)
    assert [one.item() for one in both] == [first.item(), second.item()] and first != second
    torch.testing.assert_close(of_both, of_first + of_second)

    # After two passes, in training or not, it is that of the later one.
    net(x, times[0])
    for later in (net.train(), net.eval()):
        later(x, times[1])
        assert tdq_exp.penalty(net.train()).item() == second.item()


def test_a_class_conditional_network_is_calibrated_with_its_classes():
    torch.manual_seed(0)
    net = tdq_exp.quantize(UNet2DModel(**{**unet().config, "num_class_embeds": 3}), tdq="none")
    x, t = batch()
    classes = torch.tensor([0, 1, 2, 0])
    tdq_exp.calibrate(net, [(x, t, classes)])
    with torch.no_grad():
        assert net(x, t, class_labels=classes).sample.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tdq_exp.quantize(torch.nn.Linear(2, 2)), TypeError, "UNet2DModel, not Linear"),
        (lambda: tdq_exp.quantize(Doubled(**unet().config)), TypeError, "Doubled, whose forward"),
        (lambda: tdq_exp.quantize(unet(), bits="w5"), ValueError, "bits/w5"),
        (
            lambda: tdq_exp.quantize(unet(), method="fp"),
            ValueError,
            "method=fp: is the float network itself",
        ),
        (lambda: tdq_exp.save(unet(), "x.safetensors"), ValueError, "not made by tdq_exp.quantize"),
        (lambda: tdq_exp.calibrate(tdq_exp.quantize(unet()), []), ValueError, "no batch"),
        (lambda: tdq_exp.quantise, AttributeError, "quantise"),
    ],
)
def test_mistakes_are_one_line(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def calibrated():
    net = tdq_exp.quantize(unet(), tdq="none")
    tdq_exp.calibrate(net, [batch()])
    return net


def with_heads(heads):
    """A network whose attentions have other heads than its config says, as LDM's have."""
    net = unet()
    set_heads(net, heads)
    return net


def test_heads_that_no_config_says_are_refused_or_kept(tmp_path):
    for overrides, source in (
        ([], with_heads(2)),
        (["+model.definition.attention_heads=2"], unet()),
    ):
        with pytest.raises(ValueError, match=r"has \d heads and the scale .*attention_heads=\d"):
            tdq_exp.quantize(source, tdq="none", overrides=overrides)

    given = {"tdq": "none", "overrides": ["+model.definition.attention_heads=2"]}
    net = tdq_exp.quantize(with_heads(2), **given)
    tdq_exp.calibrate(net, [batch()])
    with pytest.raises(ValueError, match="its attentions have other heads"):
        tdq_exp.correct(net, unet(), torch.zeros(2, 1, 8, 8))
    tdq_exp.save(net, tmp_path / "net.safetensors")
    with torch.no_grad():
        found = tdq_exp.load(tmp_path / "net.safetensors")(*batch(5)).sample
        assert torch.equal(found, net(*batch(5)).sample)


class Doubled(UNet2DModel):
    """A network of which a config says the class of, and not what it computes."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * 2


def with_nan():
    net = unet()
    net.conv_in.weight.data[0] = math.nan
    return net


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: unet().half(), "float16, wanted float32"),
        (lambda: unet().to("meta"), "conv_in.weight: has no values"),
        (with_nan, "conv_in.weight: has values that are not finite"),
    ],
    ids=["half", "meta", "nan"],
)
def test_weights_that_nothing_can_come_of_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        tdq_exp.quantize(make())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 4}, "bits=4: must be"),
        ({"habits": ["text"]}, "habits="),
        ({"overrides": "fit.lr=1"}, "overrides='fit.lr=1': wanted a list"),
        ({"overrides": {"fit.lr": 1}}, "wanted a list"),
        ({"overrides": [3]}, "overrides=3"),
        ({"overrides": ["model.definition.network.sample_size=16"]}, "leave this out"),
        ({"overrides": ["seed=3"]}, "seed=3: would do nothing here: call torch.manual_seed"),
        ({"overrides": ["fit.lr=0.5"]}, "arguments of parameter_groups"),
        ({"overrides": ["fit.correction=rescale"]}, "tdq_exp.correct corrects"),
        ({"overrides": ["calibration.samples=9"]}, "tdq_exp.calibrate takes the samples"),
    ],
)
def test_choices_that_are_none_are_refused(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        tdq_exp.quantize(unet(), **options)
    assert "\n" not in str(caught.value)


X, T = batch()


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (None, "not NoneType"),
        ([X], "a tuple of tensors"),
        ([(X, T, T)], r"must be \(x_t, t\)"),
        ([{"x": X, "t": T}], "a tuple of tensors"),
        ([(X.numpy(), T.numpy())], "a tuple of tensors"),
        ([(X, T), (X, T[:3])], r"t is torch.int64 \[3\]"),
        ([(X, T + 0.5)], "whole numbers"),
        ([(X, T * math.nan)], "whole numbers"),
        ([(X, T + 1)], "from 0 to 999"),
        ([(X, T - 1)], "from 0 to 999"),
        ([(X * math.nan, T)], "not finite"),
        ([(X / 0, T)], "not finite"),
        ([(X.double(), T)], "float64"),
        ([(X.expand(-1, 3, -1, -1), T)], r"\[4, 3, 8, 8\], wanted float32 \[B, 1, H, W\]"),
        ([(X[:0], T[:0])], r"\[0, 1, 8, 8\]"),
    ],
)
def test_batches_that_nothing_can_be_learned_from_leave_the_network_as_it_was(
    shown, words, calibrated
):
    before = {key: value.clone() for key, value in calibrated.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        tdq_exp.calibrate(calibrated, shown)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[key], now) for key, now in calibrated.state_dict().items())


def test_a_calibration_at_one_time_step_is_done_with_a_warning(recwarn):
    net = tdq_exp.quantize(unet(), tdq="none")
    tdq_exp.calibrate(net, [batch(), (X, torch.full_like(T, 7))])
    assert not [one for one in recwarn if "every sample" in str(one.message)]

    with pytest.warns(UserWarning, match="every sample is of t=7; .* 0 to 999"):
        tdq_exp.calibrate(net, [(X, torch.full_like(T, 7))])


def test_step_sizes_without_values_are_not_baked_or_called(calibrated, tmp_path):
    net = tdq_exp.quantize(unet(), tdq="none")
    x, t = batch(size=1)
    with pytest.raises(ValueError, match="wanted float32"):
        tdq_exp.calibrate(net, [(x.double(), t)])

    calls = (
        lambda net: net(x, t),
        lambda net: copy.deepcopy(net)(x, t),
        tdq_exp.bake,
        lambda net: tdq_exp.save(net, tmp_path / "net.safetensors"),
    )
    for call in calls:
        with pytest.raises(ValueError, match="step sizes have no values yet"):
            call(net)
    assert not list(tmp_path.iterdir())

    # A state dict has them, too, but not the float network's.
    net.load_state_dict(unet().state_dict(), strict=False)
    with pytest.raises(ValueError, match="step sizes have no values yet"):
        net(x, t)
    net.load_state_dict(calibrated.state_dict())
    assert tdq_exp.save(copy.deepcopy(net), tmp_path / "net.safetensors")


def test_wrapped_and_quantized_networks_are_refused(calibrated):
    average = torch.optim.swa_utils.AveragedModel(calibrated)
    with pytest.raises(ValueError, match=r"wrapped in AveragedModel: give its \.module"):
        tdq_exp.bake(average)
    assert tdq_exp.bake(average.module)
    with pytest.raises(ValueError, match="quantized already"):
        tdq_exp.quantize(calibrated)


def test_a_state_dict_of_other_bits_is_refused(calibrated):
    file = io.BytesIO()
    torch.save(calibrated.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    net = tdq_exp.quantize(unet(), tdq="none")
    assert net.load_state_dict(state).missing_keys == []

    wider = tdq_exp.quantize(unet(), bits="w4a8", tdq="none")
    with pytest.raises(RuntimeError, match=r"conv_in\.input_quantizer: .* 0\.\.15, not 0\.\.255"):
        wider.load_state_dict(state)


def test_what_has_nothing_to_train_is_refused(calibrated):
    baked = tdq_exp.bake(calibrated)
    for call in (
        lambda: tdq_exp.calibrate(baked, [batch()]),
        lambda: tdq_exp.parameter_groups(baked, lr=1e-3),
    ):
        with pytest.raises(ValueError, match="the network is baked"):
            call()
    with pytest.raises(ValueError, match="not made by"):
        tdq_exp.penalty(unet())


@pytest.mark.parametrize(
    "rates",
    [{"lr": math.nan}, {"lr": -1.0}, {"lr": "1e-3"}, {"lr": 1.0, "lr_zero_point": math.inf},
     {"lr": 1.0, "decay": -1.0}],
)  # fmt: skip
def test_rates_out_of_range_are_refused(rates, calibrated):
    with pytest.raises(ValueError, match=f"{list(rates)[-1]}="):
        tdq_exp.parameter_groups(calibrated, **rates)


def test_networks_with_values_that_are_not_finite_are_not_saved(calibrated, tmp_path):
    net = copy.deepcopy(calibrated)
    net.conv_in.layer.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="conv_in.layer.weight: has values that are not finite"):
        tdq_exp.save(net, tmp_path / "net.safetensors")


@pytest.mark.parametrize("path", [None, 7, "", "a\0b"])
def test_what_is_no_path_is_refused(path, calibrated):
    for call in (tdq_exp.load, lambda path: tdq_exp.save(calibrated, path)):
        with pytest.raises(ValueError, match="is no path"):
            call(path)


def test_a_file_that_is_neither_run_nor_packed_network_is_refused(tmp_path):
    (tmp_path / "fit.json").write_text("{}")
    with pytest.raises(ValueError, match="is a file; wanted the folder of a run"):
        tdq_exp.load(tmp_path / "fit.json")
