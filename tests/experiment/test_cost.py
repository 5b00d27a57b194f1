"""What a plan measures: a forward pass of each network, once."""

from __future__ import annotations

import torch

from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import cost

WORDS = ["model=tiny", "model.weights=random", "tracker=none"]


def job(out, *words):
    return jobs.build(compose([*WORDS, f"out={out}", *words]), source=False)


def test_one_pass_is_measured_for_all_forms_of_a_network(tmp_path, monkeypatch):
    measured = []

    def seconds(made, net, device):
        measured.append(made.model)
        return 1.0

    monkeypatch.setattr(cost, "_FORWARD", {})
    monkeypatch.setattr(cost, "_measured_seconds", seconds)
    forms = [
        ["method=lsq", "tdq=none"],
        ["method=lsq", "tdq=temporal"],
        ["method=pact", "bits=w8a8"],
        ["method=ptq4dm"],
        ["method=fp"],
    ]
    costs = [cost.estimate(job(tmp_path, *form)) for form in forms]
    assert len(measured) == 1
    images = job(tmp_path).sampling
    assert all(c.sample_seconds == images.images * images.steps for c in costs)

    # A network that is larger, or computes with other threads, is another one.
    cost.estimate(job(tmp_path, "model.definition.network.layers_per_block=2"))
    assert len(measured) == 2
    assert cost.network_key(job(tmp_path)) != cost.network_key(job(tmp_path, "model=digits"))


def test_what_is_measured_is_kept_as_it_was_counted(tmp_path, monkeypatch):
    """Parameters and passes are counted on shapes: the same as on the network itself."""
    monkeypatch.setattr(cost, "_FORWARD", {})  # another test may have measured this network
    monkeypatch.setattr(cost, "_measured_seconds", lambda made, net, device: 1.0)
    made = job(tmp_path, "method=ptq4dm")
    found, net = cost.estimate(made), made.model.build()
    work = made.fit.work(made.model, net, made.sampling.steps)
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.fit_seconds == work.forward_passes and found.fit_text == work.text


def test_the_time_is_that_of_float32_products(monkeypatch):
    """As images are sampled; left alone, a GPU computes convolutions in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    def work():
        seen.append(torch.backends.cudnn.allow_tf32)
        return torch.zeros(1)

    cost._seconds(work)
    assert seen == [False] * 4 and torch.backends.cudnn.allow_tf32
