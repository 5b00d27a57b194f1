"""The public functions for people with a network and a training loop of their own."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from hydra.core.global_hydra import GlobalHydra

import tdq_exp
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
    given = {"unet": unet(), "batches": [batch(1), batch(2)], "loader": [(*batch(3), eps)]}
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


def test_every_parameter_is_in_one_group_and_the_rates_are_as_asked():
    net = tdq_exp.quantize(unet())
    groups = {group["name"]: group for group in tdq_exp.parameter_groups(net, lr=1e-3)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "weights": 1e-3, "step_sizes": 1e-4, "zero_points": 1e-3, "generators": 1e-3
    }  # fmt: skip
    counted = sum(p.numel() for group in groups.values() for p in group["params"])
    assert counted == sum(p.numel() for p in net.parameters())
    assert float(tdq_exp.penalty(net)) == 0


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
        (lambda: tdq_exp.quantize(unet(), bits="w5"), ValueError, "bits/w5"),
        (lambda: tdq_exp.quantize(unet(), method="fp"), ValueError, "needs quantizers"),
        (lambda: tdq_exp.save(unet(), "x.safetensors"), ValueError, "not made by tdq_exp.quantize"),
        (lambda: tdq_exp.calibrate(tdq_exp.quantize(unet()), []), ValueError, "no batch"),
        (lambda: tdq_exp.quantise, AttributeError, "quantise"),
    ],
)
def test_mistakes_are_one_line(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
