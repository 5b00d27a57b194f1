"""Whole runs of a tiny latent model, through the stages of any other: its autoencoder, its network, quantized fits."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tdq_exp.commands import export
from tdq_exp.commands import sample as sample_command
from tdq_exp.commands.pack import pack
from tdq_exp.config.compose import compose
from tdq_exp.deploy import integer
from tdq_exp.diffusion.draws import Stream, generator
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import cost as costs
from tdq_exp.experiment import pipeline, sample_stage
from tdq_exp.experiment.stored_network import finished_net
from tdq_exp.fit.loop import Interrupted
from tdq_exp.models.weights.fill import save_weights
from tdq_exp.runtime import files
from tdq_exp.runtime.processes import Processes

QUICK = ["model=tiny_latent", "tracker=none", "launcher=cpu", "protocol.qat.calibration_samples=64"]


def build(out, *overrides):
    return jobs.build(compose([*QUICK, f"out={out}", *overrides]))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A tiny autoencoder, trained for four updates."""
    made = build(tmp_path_factory.mktemp("autoencoder"), "method=fp", "fit=pretrain_autoencoder")
    assert pipeline.run(made) == [] and made.name == "tiny_latent_fp_autoencoder"
    assert (made.folder / "grid.png").exists()  # images and their reconstructions
    return made.folder / "weights.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory, autoencoder):
    """The overrides that name a float net and its autoencoder."""
    out = tmp_path_factory.mktemp("float")
    made = build(out, "method=fp", "fit=pretrain", f"model.autoencoder={autoencoder}")
    assert pipeline.run(made) == []
    return [
        f"model.weights={made.folder / 'weights.safetensors'}",
        f"model.autoencoder={autoencoder}",
    ]


@pytest.fixture(scope="module", autouse=True)
def _few_start_values(few_start_values_of_a_module):
    """All fits of this file are calibrated alike, so that they can be compared."""


@pytest.fixture(scope="module")
def default_run(tmp_path_factory, weights):
    """Where the default run lies, finished, with the latents that it encoded in `cache`."""
    out = tmp_path_factory.mktemp("default")
    pipeline.run(build(out, *weights, "launcher.threads=1", f"data.cache={out / 'cache'}"))
    return out


@pytest.fixture
def finished(default_run, tmp_path):
    """A copy of the default run in the test's own folder: there it is done already."""
    shutil.copytree(default_run / "runs", tmp_path / "runs")


def state(made, name="baked"):
    return load_file(made.folder / f"{name}.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_autoencoder_ends_with_a_scale_and_knows_nothing_of_the_network(autoencoder):
    found = load_file(autoencoder)
    assert found["scale"].shape == () and float(found["scale"]) not in (0.0, 1.0)
    parts = json.loads((autoencoder.parent / "fit.json").read_text())["parts"]
    assert (
        parts["fit"]["part"] == "autoencoder"
        and parts["model"]["definition"]["network"]["latent_channels"] == 2
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["tdq=temporal"],
        ["method=minmax", "tdq=none", "plan=float_attention"],
        ["method=ptq4dm", "calibration=forward"],
    ],
    ids=["trained", "post-training", "forward"],
)
def test_a_latent_model_goes_from_float_net_to_row(tmp_path, weights, overrides):
    made = build(tmp_path, *weights, *overrides)
    (row,) = pipeline.run(made)
    assert row["images"] == 12 and np.isfinite(list(row["metrics"].values())).all()
    assert row["reconstructed"]["images"] == row["held_out"]["images"] == 12
    assert (
        row["reconstructed"]["fid"] != row["held_out"]["fid"]
        and row["autoencoder"] == made.model.autoencoder.hash
    )
    pixels = np.load(made.folder / made.sample_name / "images" / "images.npy")
    assert pixels.shape == (12, 8, 8, 1)  # decoded
    layers = json.loads((made.folder / "layers.json").read_text())["layers"]
    # The first stage is not quantized.
    assert layers and not any("encoder" in name for name, _ in layers)
    assert pipeline.run(build(tmp_path, *weights, *overrides)) == [row]


@pytest.mark.parametrize("kind", ["qat", "autoencoder"])
def test_a_killed_fit_ends_with_the_bits_of_one_that_was_not(request, tmp_path, weights, kind):
    cache = tmp_path / "cache"
    if kind == "qat":
        overrides, name = [*weights, f"data.cache={cache}"], "baked"
        out = request.getfixturevalue("default_run")
        whole = build(out, *overrides)
        # That two processes encode the same latents is a law of its own.
        shutil.copytree(out / "cache", cache)
    else:
        overrides, name = (
            ["method=fp", "fit=pretrain_autoencoder", f"data.cache={cache}"],
            "weights",
        )
        whole = build(request.getfixturevalue("autoencoder").parents[3], *overrides)
    assert (whole.folder / "fit.json").exists()  # finished by a fixture

    with pytest.raises(Interrupted):
        pipeline.run(build(tmp_path / "killed", *overrides, "fit.stop_after=3"))
    killed = build(tmp_path / "killed", *overrides)
    pipeline.run(killed)
    assert same(state(whole, name), state(killed, name))


def test_reconstructions_are_images_through_one_draw_of_their_latents(tmp_path, weights):
    made = build(tmp_path, *weights)
    processes = Processes(cpu=True)
    held_out = pipeline.load_data(made, processes).held_out
    back = sample_stage.Reconstructions(made.model, held_out, 150, processes)
    assert len(back) == 150 and back.content == f"{held_out.content}-{made.model.codec.fingerprint}"
    net = made.model.autoencoder.net()
    for i in (0, 149):
        x = torch.from_numpy(held_out.pixels[i : i + 1].copy()).permute(0, 3, 1, 2) / 127.5 - 1
        noise = torch.randn(
            1, *made.model.sample_shape, generator=generator(0, Stream.RECONSTRUCTION, i)
        )
        mean, log_variance = net.posterior(x)
        image = net.kl.decode(mean + torch.exp(0.5 * log_variance) * noise).sample
        pixels = (image.clamp(-1, 1) * 127.5 + 127.5).permute(0, 2, 3, 1).detach().numpy()
        assert np.abs(back[i : i + 1] - pixels).max() <= 0.501
    processes.close()


def test_an_exported_net_has_its_losses_beside_it(tmp_path, autoencoder):
    made = build(
        autoencoder.parents[3],
        "method=fp",
        "fit=pretrain_autoencoder",
        f"fit.export={tmp_path}/a.safetensors",
    )
    pipeline.run(made)  # long done: only the copy is made
    assert (tmp_path / "a.safetensors").read_bytes() == autoencoder.read_bytes()
    history = json.loads((tmp_path / "a.history.json").read_text())
    facts = json.loads((autoencoder.parent / "fit.json").read_text())["facts"]
    assert (
        history["validation_loss"] == facts["validation"]
        and history["commit"] == facts["environment"]["commit"]
    )
    assert history["net"] == "a.safetensors" and history["name"] == made.name


def test_latents_are_encoded_once_for_all_fits(tmp_path, weights, default_run, monkeypatch):
    shutil.copytree(default_run / "cache", tmp_path / "cache")
    assert any((tmp_path / "cache" / "latents").iterdir())
    cache = f"data.cache={tmp_path / 'cache'}"
    monkeypatch.setattr("tdq_exp.models.codec.ScaledAutoencoder.encode", None)
    pipeline.run(build(tmp_path / "b", *weights, cache, "bits=w8a8"))
    # The same weights in another architecture make other latents.
    other = build(
        tmp_path / "c", *weights, cache, "model.definition.autoencoder.network.norm_num_groups=2"
    )
    with pytest.raises(TypeError, match="not callable"):
        pipeline.run(other)


def test_another_autoencoder_under_the_same_name_is_refused(
    tmp_path, weights, autoencoder, finished
):
    made = build(tmp_path, *weights)
    pipeline.run(made)
    other = load_file(autoencoder)
    other["scale"] = other["scale"] * 2
    save_weights(other, tmp_path / "other.safetensors", {})
    with pytest.raises(ValueError, match=r"autoencoder: \w{16} -> \w{16}.*label=NAME"):
        pipeline.run(
            build(tmp_path, weights[0], f"model.autoencoder={tmp_path / 'other.safetensors'}")
        )
    save_weights(other, tmp_path / "kept.safetensors", {})
    moved = files.read_json(made.folder / "fit.json")
    moved["config"]["model"]["autoencoder"] = str(tmp_path / "kept.safetensors")
    files.write_json(made.folder / "fit.json", moved)
    with pytest.raises(ValueError, match="model.autoencoder: is not the one of"):
        sample_command.load(made.folder)


def test_a_latent_net_runs_on_integers_and_is_packed(tmp_path, weights, finished, monkeypatch):
    made = build(tmp_path, *weights)
    pipeline.run(made)
    if integer.unavailable(torch.device("cpu")) is None:
        coded = build(tmp_path, *weights, "sampler.engine=integer", "sampler.min_speedup=0")
        (row,) = pipeline.run(coded)
        assert row["engine"].startswith("integer: ")
        simulated, integers = (
            np.load(m.folder / m.sample_name / "images" / "images.npy").astype(int)
            for m in (made, coded)
        )
        assert (
            np.abs(simulated - integers).mean() < 2
        )  # of 255; the nets' rounding is the same, sums' order is not
    file = pack(made.folder)
    _, net = sample_command.load(file)
    _, baked = sample_command.load(made.folder)
    x, t = torch.randn(2, 2, 4, 4), torch.tensor(400)
    assert torch.equal(net(x, t).sample, baked(x, t).sample)
    monkeypatch.setattr(type(made.model.autoencoder), "hash", "0123456789abcdef")
    with pytest.raises(
        ValueError,
        match=r"model.autoencoder: is not the one of .*packed.safetensors \(0123456789abcdef",
    ):
        sample_command.load(file)


@pytest.mark.usefixtures("operators_listed_once")
def test_a_latent_net_is_exported_in_the_portable_form(tmp_path, weights):
    """At 8 bits a code that falls on the other side of a border changes little."""
    pytest.importorskip("onnxruntime", reason="export is an optional extra")
    # Attention once, and nothing in the middle: exporting takes a second for each block.
    made = build(
        tmp_path,
        weights[1],
        f"model.weights={tmp_path / 'net.safetensors'}",
        "model.definition.network.down_block_types=[DownBlock2D, AttnDownBlock2D]",
        "+model.definition.network.mid_block_type=null",
        "model.definition.network.up_block_types=[ResnetUpsampleBlock2D, UpBlock2D]",
        "bits=w8a8",
    )
    save_weights(made.model.build(), tmp_path / "net.safetensors", {})
    pipeline.run(made)
    file = export.export(made.folder, tmp_path / "net.onnx", "portable")
    differences = [found for _, found, _ in export.compare(*sample_command.load(made.folder), file)]
    assert len(differences) == 4 and max(differences) < 0.02

    # It takes any batch, also beyond the limit with which it was recorded, and promises none.
    run, x = export.session(file), torch.randn(65, *made.model.sample_shape).numpy()
    whole = run.run(None, {"x_t": x, "t": np.array(400)})[0]
    for batch in (1, 63, 64):
        part = run.run(None, {"x_t": x[-batch:], "t": np.array(400)})[0]
        assert np.abs(part - whole[-batch:]).max() <= 1e-5 * np.abs(whole).max()
    assert b"VR[" not in file.read_bytes()


def test_two_processes_encode_and_sample_a_latent_model_as_one_does(
    tmp_path, weights, default_run, together
):
    arguments = [*QUICK, *weights, "launcher.threads=1", f"out={tmp_path}"]
    assert together(*arguments, f"data.cache={tmp_path / 'cache'}") == 0

    found = {}
    for count, out in (("1", default_run), ("2", tmp_path)):
        latents = (out / "cache" / "latents").glob("*/moments.npy")
        moments = {path.parent.name: path.read_bytes() for path in latents}
        metrics = out / "runs/tiny_latent_w4a4_lsq_tdq/seed0/ddim3_n12/metrics.json"
        (row,) = files.read_json(metrics)["rows"]
        found[count] = moments, row["reconstructed"], row["processes"]
    assert (
        len(found["1"][0]) == 2 and found["1"][0] == found["2"][0]
    )  # training and held-out set, bit for bit
    assert found["1"][1]["fid"] == pytest.approx(found["2"][1]["fid"], rel=1e-3)
    assert (found["1"][2], found["2"][2]) == (1, 2)


def test_mistakes_are_one_line_that_names_the_key(tmp_path, weights, autoencoder):
    with pytest.raises(ValueError, match="model.autoencoder has no value"):
        pipeline.run(build(tmp_path, weights[0]))
    with pytest.raises(ValueError, match="autoencoder=net.safetensors: this model has none"):
        jobs.build(
            compose(
                ["model=tiny", "model.weights=x.safetensors", "model.autoencoder=net.safetensors"]
            )
        )
    with pytest.raises(ValueError, match="fit.part=autoencoder: this model has no such part"):
        jobs.build(compose(["model=tiny", "method=fp", "fit=pretrain_autoencoder"]))
    with pytest.raises(ValueError, match=r"fit\.part: there is no such key"):
        build(tmp_path, *weights, "fit.part=autoencoder")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.definition.autoencoder.scale=0", "autoencoder.scale=0: must be a positive number"),
        (
            "model.definition.autoencoder.scale=-1",
            "autoencoder.scale=-1: must be a positive number",
        ),
        (
            "model.definition.autoencoder.scale=inf",
            "autoencoder.scale=inf: must be a finite number",
        ),
        (
            "model.definition.autoencoder.scale=big",
            "autoencoder.scale=big: must be a number or null",
        ),
        ("model.definition.autoencoder.batch=2.5", "autoencoder.batch=2.5: must be a whole number"),
        ("model.definition.autoencoder.batch=big", "autoencoder.batch=big: must be a whole number"),
        (
            "model.definition.autoencoder=null",
            "model.definition.autoencoder=None: a latent model needs one",
        ),
        (
            "model.definition.attention_heads=x",
            "model.definition.attention_heads=x: must be a whole number",
        ),
        ("model.definition.loss=L1", "model.definition.loss=L1: choose one of l2, l1"),
    ],
)
def test_a_definition_that_makes_no_sense_is_refused_before_anything_is_encoded(
    tmp_path, weights, override, message
):
    with pytest.raises(ValueError) as caught:
        build(tmp_path, *weights, override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_images_are_drawn_from_a_finished_run_but_not_from_an_autoencoder(
    tmp_path, weights, autoencoder, finished, inside
):
    pipeline.run(build(tmp_path, *weights))
    run = tmp_path / "runs" / "tiny_latent_w4a4_lsq_tdq" / "seed0"
    done = inside(str(run), "--images", "3", "--cpu", "--out", "drawn", verb="sample")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 3
    done = inside(str(autoencoder.parent), "--out", "other", verb="sample")
    assert (
        done.returncode == 2
        and "is the model's autoencoder" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_plan_of_an_autoencoder_counts_its_own_parameters(tmp_path, inside):
    done = inside(
        *QUICK, "method=fp", "fit=pretrain_autoencoder", f"out={tmp_path}", "plan_only=true"
    )
    assert done.returncode == 0, done.stderr
    made = build(tmp_path, "method=fp", "fit=pretrain_autoencoder")
    count = sum(p.numel() for p in made.trained.build().parameters())
    assert f"{count:,} parameters" in done.stdout


def test_the_plan_of_a_latent_model_counts_its_encoding_and_decoding(
    tmp_path, weights, monkeypatch
):
    made = build(tmp_path, *weights)
    whole = costs.estimate(made)
    assert whole.encode_seconds > 0
    for overrides in (
        ["method=fp"],
        ["method=ptq4dm"],
    ):  # a net that is loaded, or shown trajectories of its own
        assert costs.estimate(build(tmp_path, *weights, *overrides)).encode_seconds == 0
    assert (
        costs.estimate(
            build(tmp_path, *weights, "method=ptq4dm", "calibration=forward")
        ).encode_seconds
        > 0
    )
    monkeypatch.setattr(costs, "_coding_seconds", lambda job, device: (0.0, 3600.0))
    slow = costs.estimate(made)
    assert slow.encode_seconds == 0 and slow.sample_seconds > 3600 * made.sampling.images
    monkeypatch.undo()
    pixels = jobs.build(
        compose(["model=tiny", *QUICK[1:], "method=fp", "fit=pretrain", f"out={tmp_path}"])
    )
    assert costs.estimate(pixels).encode_seconds == 0


def test_finished_networks_are_read_back(autoencoder):
    made = build(autoencoder.parents[3], "method=fp", "fit=pretrain_autoencoder")
    fit = files.read_json(made.folder / "fit.json")["fingerprint"]
    net = finished_net(made, fit, torch.device("cpu"))
    assert same(net.state_dict(), load_file(autoencoder))
