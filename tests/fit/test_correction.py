"""Corrections: their tables against a slow regression, and their way from a fit to a sampler."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import linregress
from torch import nn

import tdq_exp
from tdq_exp.config.compose import compose
from tdq_exp.diffusion import Ddim
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline
from tdq_exp.fit import correction as corrections
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.quant.time import TimeContext

QUICK = ["model=tiny", "tracker=none", "launcher=cpu", "method=minmax", "tdq=none", "bits=w4a4"]


def predictions(steps, channels=2, each=40):
    """Float and quantized predictions at some time steps: gain, offset and noise of their own."""
    g = torch.Generator().manual_seed(0)
    for number, t in enumerate(steps):
        eps = torch.randn(each, channels, 3, 3, generator=g)
        bias = torch.linspace(-0.2, 0.3, channels)[:, None, None]
        noise = 0.1 * (1 + number) * torch.randn(eps.shape, generator=g)
        yield t, eps, (0.9 + 0.2 * number) * eps + bias + noise


def corrected(steps, total=20, rule="ptqd"):
    time = TimeContext(total)
    correction = corrections.NoiseCorrection(2, time)
    pairs = {t: (eps, eps_hat) for t, eps, eps_hat in predictions(steps)}
    measured = {t: corrections._measure(*pair, t, rule) for t, pair in pairs.items()}
    corrections._fill(correction, measured)
    return correction, pairs


@pytest.mark.parametrize("rule", ["ptqd", "rescale"])
def test_slope_bias_and_variance_are_those_of_a_regression(rule):
    correction, pairs = corrected([3, 10, 15], rule=rule)
    for t, (eps, eps_hat) in pairs.items():
        slope = linregress(eps.numpy().ravel(), (eps_hat - eps).numpy().ravel()).slope
        assert (slope < 0) == (t == 3)  # the first network predicts too little
        slope = max(slope, 0.0) if rule == "ptqd" else slope
        np.testing.assert_allclose(correction.k[t], slope, rtol=1e-5)

        residual = eps_hat.double() / (1 + slope) - eps.double()
        bias = residual.mean(dim=(0, 2, 3))
        np.testing.assert_allclose(correction.bias[t], bias, rtol=1e-4, atol=1e-7)
        variance = (residual - bias[:, None, None]).square().mean()
        np.testing.assert_allclose(correction.variance[t], variance, rtol=1e-5)


def test_a_rescaled_prediction_has_the_size_of_eps_and_is_at_most_doubled():
    g = torch.Generator().manual_seed(2)
    eps, noise = torch.randn(2, 400, 2, 3, 3, generator=g)
    for gain, wanted in ((0.7, 1.0), (0.55, 1.0), (0.4, 0.8), (1.3, 1.0)):
        found = corrections._measure(eps, gain * eps + 0.1 * noise, 5, "rescale")
        tilde = (gain * eps + 0.1 * noise) / (1 + found.k)
        slope = linregress(eps.numpy().ravel(), tilde.numpy().ravel()).slope
        assert slope == pytest.approx(wanted, abs=0.01)


def test_noised_images_are_as_many_at_each_of_evenly_spaced_steps(monkeypatch):
    monkeypatch.setattr(corrections, "IMAGES", 3)
    job = jobs.build(compose(["model=tiny", "method=fp", "fit=pretrain"]), source=False)
    images = Plain(torch.rand(7, 1, 8, 8) * 2 - 1)
    samples = corrections.NoisedImages(job.model, images, seed=1)
    assert len(samples) == 150
    steps, counts = samples.times().unique(return_counts=True)
    assert steps.tolist() == list(range(0, 1000, 20)) and set(counts.tolist()) == {3}

    x_t, t, condition = samples.batch(slice(40, 60))
    draws = samples.draws.of(slice(40, 60))
    expected = job.model.schedule.add_noise(images.x_0[draws.index], draws.eps, t)
    assert torch.equal(x_t, expected) and torch.equal(t, samples.times()[40:60])
    assert condition is None
    same, other = (corrections.NoisedImages(job.model, images, seed) for seed in (1, 2))
    assert torch.equal(same.batch(slice(0, 9))[0], samples.batch(slice(0, 9))[0])
    assert not torch.equal(other.batch(slice(0, 9))[0], samples.batch(slice(0, 9))[0])


class Plain:
    """Images in memory, as a training set."""

    random = False

    def __init__(self, x_0):
        self.x_0 = x_0

    def __len__(self):
        return len(self.x_0)

    def batch(self, index, flip, noise):
        assert not flip.any() and noise is None
        return self.x_0[index]

    def condition(self, index):
        return None


def test_tables_are_linear_between_measured_steps_and_constant_beyond():
    correction, _ = corrected([3, 10, 15])
    for table in (correction.k, correction.bias, correction.variance):
        table = table.reshape(20, -1)
        for column in table.unbind(1):
            expected = np.interp(np.arange(20), [3, 10, 15], column[[3, 10, 15]])
            np.testing.assert_allclose(column, expected, rtol=1e-5, atol=1e-7)


def test_one_measured_step_is_the_whole_table():
    correction, _ = corrected([7])
    assert (correction.bias == correction.bias[7]).all() and (correction.bias != 0).all()


def test_the_main_process_measures_for_all():
    table, facts = corrected([3, 10, 15])[0].state_dict(), {"k_min": 0.0}
    others = SimpleNamespace(
        decide=lambda ask: corrections.Tables(dict(table), facts), device=torch.device("cpu")
    )
    net = nn.Module()
    net.time = TimeContext(20)
    model = SimpleNamespace(sample_shape=(2, 3, 3))
    assert corrections.correct(net, net, model, None, others, "ptqd") == facts
    assert all(torch.equal(value, table[key]) for key, value in net.correction.state_dict().items())


@pytest.mark.parametrize("t", [10, torch.tensor([3, 10, 15, 3])])
def test_the_error_falls_and_each_sample_has_its_own_step(t):
    correction, pairs = corrected([3, 10, 15])
    for number, step in enumerate(torch.as_tensor(t).reshape(-1).tolist()):
        eps, eps_hat = (value[:4] for value in pairs[step])
        with correction.time.at(torch.as_tensor(t)):
            fixed = correction(eps_hat)
        scale, bias = 1 + correction.k[step], correction.bias[step][:, None, None]
        rows = slice(None) if torch.as_tensor(t).dim() == 0 else slice(number, number + 1)
        torch.testing.assert_close(fixed[rows], (eps_hat / scale - bias)[rows])
        assert (fixed[rows] - eps[rows]).square().mean() < (
            eps_hat[rows] - eps[rows]
        ).square().mean()


def test_a_prediction_that_is_not_finite_is_refused():
    eps = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    with pytest.raises(FloatingPointError, match=r"fit\.correction=ptqd: at t = 9 .*not finite"):
        corrections._measure(eps, eps * torch.inf, 9, "ptqd")


class Known(nn.Module):
    """A predictor that gives x back and knows its own error."""

    def __init__(self, variance):
        super().__init__()
        self.variance = variance

    def forward(self, x, t):
        return x

    def residual_variance(self, t):
        return self.variance


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_sampler_adds_as_much_less_noise_as_the_error_brings(eta):
    schedule = jobs.build(
        compose(["model=tiny", "method=fp", "fit=pretrain"]), source=False
    ).model.schedule
    ddim = Ddim(steps=10, eta=eta)
    plain = ddim.trajectory(lambda x, t: x, schedule)
    known = ddim.trajectory(Known(1e-4), schedule)

    for (t, before), (same, after) in zip(plain, known, strict=True):
        assert t == same and before[:4] == after[:4]
        # x_{t-1} moves by c for each unit of eps: read from the update itself.
        x = torch.zeros(1, dtype=torch.float64)
        one = ddim.update(torch.ones(1, dtype=torch.float64), x, before, None)
        c = float(one - ddim.update(torch.zeros(1, dtype=torch.float64), x, before, None))
        left = max(before.sigma**2 - 1e-4 * c**2, 0.0)
        assert after.sigma**2 == pytest.approx(left if eta else 0.0, abs=1e-15)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_weights):
    """A finished corrected run, and the same fit without the correction."""
    out = tmp_path_factory.mktemp("ptqd")
    made = {}
    for name in ("none", "ptqd"):
        overrides = [
            *QUICK,
            f"out={out}",
            f"model.weights={tiny_weights}",
            f"fit.correction={name}",
        ]
        made[name] = jobs.build(compose(overrides))
        pipeline.run(made[name])
    return made


def test_a_corrected_run_has_a_name_a_fingerprint_and_facts_of_its_own(run):
    plain, fixed = (json.loads((made.folder / "fit.json").read_text()) for made in run.values())
    assert run["ptqd"].name == f"{run['none'].name}_ptqd"
    assert fixed["parts"]["fit"] == {**plain["parts"]["fit"], "correction": "ptqd"}
    facts = fixed["facts"]["correction"]
    assert facts["error_after"] < facts["error_before"] and "correction" not in plain["facts"]


def test_it_is_baked_loaded_packed_and_computed_in_integers(run, tmp_path, inside):
    made = run["ptqd"]
    net = tdq_exp.load(made.folder)
    plain = tdq_exp.load(run["none"].folder)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        for t in (0, 500, 999):
            eps_hat = plain(x, torch.tensor(t), return_dict=False)[0]
            scale, bias = 1 + net.correction.k[t], net.correction.bias[t][:, None, None]
            expected = eps_hat / scale - bias
            assert torch.equal(net(x, torch.tensor(t), return_dict=False)[0], expected)
            assert torch.equal(net(x, torch.tensor(t)).sample, expected)

    assert (
        Denoiser(net, made.model).residual_variance(500) == float(net.correction.variance[500]) > 0
    )
    assert Denoiser(plain, made.model).residual_variance(500) == 0.0

    file = tmp_path / "net.safetensors"
    inside(str(made.folder), "--out", str(file), verb="pack")
    packed = tdq_exp.load(file)
    assert all(
        torch.equal(packed.state_dict()[key], value) for key, value in net.state_dict().items()
    )
    with torch.no_grad():
        same = packed(x, torch.tensor(500), return_dict=False)[0]
        assert torch.equal(same, net(x, torch.tensor(500), return_dict=False)[0])


def test_the_same_command_does_nothing(run):
    before = (run["ptqd"].folder / "fit.json").read_bytes()
    pipeline.run(run["ptqd"])
    assert (run["ptqd"].folder / "fit.json").read_bytes() == before


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"fit\.correction='qncd': choose"):
        jobs.build(compose([*QUICK, "model.weights=x", "fit.correction=qncd"]), source=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_weights):
    """A training whose prediction is rescaled, finished, and the same one without."""
    out, made = tmp_path_factory.mktemp("rescaled"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corrections, "IMAGES", 2)
        for name in ("none", "rescale"):
            overrides = [*QAT, f"out={out}", f"model.weights={tiny_weights}"]
            made[name] = jobs.build(compose([*overrides, f"fit.correction={name}"]))
            pipeline.run(made[name])
    return made


QAT = [
    "model=tiny", "tracker=none", "launcher=cpu", "method=lsq", "tdq=temporal", "bits=w3a3",
    "protocol.qat.calibration_samples=64",
]  # fmt: skip


def test_a_training_is_corrected_by_tables_and_else_the_same(trained):
    plain, fixed = (json.loads((made.folder / "fit.json").read_text()) for made in trained.values())
    assert trained["rescale"].name == f"{trained['none'].name}_rescaled"
    assert fixed["parts"]["fit"] == {**plain["parts"]["fit"], "correction": "rescale"}
    assert fixed["facts"]["validation"] == plain["facts"]["validation"]
    assert -0.5 <= fixed["facts"]["correction"]["k_min"] < 0

    net, same = (tdq_exp.load(trained[name].folder) for name in ("rescale", "none"))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in (0, 490, 999):
            eps_hat = same(x, torch.tensor(t)).sample
            scale, bias = 1 + net.correction.k[t], net.correction.bias[t][:, None, None]
            assert torch.equal(net(x, torch.tensor(t)).sample, eps_hat / scale - bias)


def test_a_correction_of_one_of_several_checkpoints_is_refused():
    with pytest.raises(ValueError, match=r"fit\.correction=rescale: .*fit\.report=last"):
        overrides = [*QAT, "model.weights=x", "fit.correction=rescale"]
        jobs.build(compose([*overrides, "fit.report=best_of_5"]), source=False)
