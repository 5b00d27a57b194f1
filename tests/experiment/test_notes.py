"""What a reader is told before a run, and beside its numbers: precision, hold-outs, few images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tdq_exp.config.compose import compose
from tdq_exp.data.images import Data, Images
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline, show
from tdq_exp.experiment.inputs import require_inputs
from tdq_exp.experiment.row import write_row
from tdq_exp.metrics.image_sets import Features, measure
from tdq_exp.runtime import environment

PRETRAIN = ["model=ddim_small", "method=fp", "fit=pretrain", "launcher=cpu", "tracker=none"]


def built(monkeypatch, able, *more):
    monkeypatch.setattr(environment, "cpu_multiplies_bfloat16", lambda: able)
    return jobs.build(compose([*PRETRAIN, *more]), source=False)


def test_a_cpu_without_bfloat16_trains_in_float32_and_records_it(monkeypatch):
    able, unable = (built(monkeypatch, value) for value in (True, False))
    assert able.config["fit"]["precision"] == "bfloat16" and not able.notes
    assert unable.config["fit"]["precision"] == unable.fit.options.precision == "float32"
    assert unable.recorded()["fit"]["precision"] == "float32"
    assert "no instructions for bfloat16" in unable.notes[0]
    assert able.part("fit") != unable.part("fit")


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_precision_that_the_user_sets_stays(precision, monkeypatch):
    job = built(monkeypatch, False, f"fit.precision={precision}")
    assert job.config["fit"]["precision"] == precision and not job.notes


def test_the_question_has_an_answer_on_this_machine():
    assert environment.cpu_multiplies_bfloat16() in (True, False)


def images(count):
    return Images(np.zeros((count, 4, 4, 1), np.uint8), f"hash{count}", "protocol")


@pytest.mark.parametrize(
    ("train", "held_out", "words"),
    [
        (19, 1, r"data\.source\.holdout: 1 of 20 images.*data\.source\.holdout=5 holds every 5th"),
        (1, 1, "1 images to train on and 1 held out.*data.limit"),
        (2, 0, "2 images to train on and 0 held out"),
        (19, 2, None),
    ],
)
def test_too_few_images_for_a_distance_are_refused_before_the_fit(train, held_out, words):
    data = Data(images(train), images(held_out))
    if words is None:
        pipeline._check_sizes(data)
        return
    with pytest.raises(ValueError, match=words):
        pipeline._check_sizes(data)


@pytest.mark.parametrize(("total", "every"), [(8, 2), (20, 5)])
def test_the_holdout_that_is_named_is_enough_for_precision_and_recall(total, every):
    with pytest.raises(ValueError, match=f"at least 4; data.source.holdout={every} holds"):
        pipeline._check_sizes(Data(images(total - 1), images(1)), 4)
    held_out = -(-total // every)
    pipeline._check_sizes(Data(images(total - held_out), images(held_out)), 4)


@pytest.mark.parametrize(
    ("numbers", "metrics", "words"),
    [
        ((1, None), ["isc", "fid"], "sampler.images=1: fid needs at least 2 images"),
        ((9, 3), ["fid", "prc"], "eval.reference_images=3: prc needs at least 4 images"),
        ((1, 1), ["isc"], None),
        ((4, 4), ["isc", "fid", "kid", "prc"], None),
    ],
)
def test_numbers_of_images_that_a_metric_is_undefined_on_are_refused(numbers, metrics, words):
    job = SimpleNamespace(
        sampling=SimpleNamespace(images=numbers[0]),
        evaluation=SimpleNamespace(reference_images=numbers[1], metrics=metrics),
    )
    if words is None:
        pipeline._check_numbers(job)
        return
    with pytest.raises(ValueError, match=words):
        pipeline._check_numbers(job)


@pytest.mark.parametrize(
    ("limit", "reference", "sampled", "named"),
    [
        (None, None, 5, None),
        (None, 20, 5, None),
        (20, None, 5, "data.limit=20: the first"),
        (None, 19, 4, "eval.reference_images=19, sampler.images=4: the first"),
    ],
)
def test_a_cut_through_a_set_that_is_sorted_by_folders_is_told(limit, reference, sampled, named):
    job = SimpleNamespace(
        data=SimpleNamespace(limit=limit),
        evaluation=SimpleNamespace(reference_images=reference),
        sampling=SimpleNamespace(images=sampled),
    )
    lines = pipeline._cut_notes(job, Data(images(20), images(5)))
    assert not lines if named is None else lines[0].startswith(named)


class Width4:
    """Features of four numbers."""

    name, weights_hash = "four", "abc"
    metric_layers = {"fid": "pool", "prc": "pool"}

    def engine(self, device):
        return "torch"

    def extract(self, pixels, batch, device, progress=None):
        noise = np.random.default_rng(len(pixels)).normal(size=(len(pixels), 4))
        return {"pool": torch.from_numpy(noise)}


@pytest.mark.parametrize(("count", "few"), [(4, 4), (5, None)])
def test_fid_of_no_more_images_than_features_is_marked(count, few, tmp_path, monkeypatch):
    processes = SimpleNamespace(
        decide=lambda work: work(), device="cpu", rank=0, world=1, main=False
    )
    monkeypatch.setattr(
        "tdq_exp.metrics.image_sets.features_of", lambda n, pixels, *_: n.extract(pixels, 1, "cpu")
    )
    features = Features(Width4(), 8, processes, tmp_path)
    pixels = np.zeros((count, 4, 4, 1), np.uint8)
    row = measure(features, pixels, images(9), images(6), ["fid"])
    assert row.get("few_for") == few


def test_the_summary_warns_of_few_images(capsys, tmp_path, monkeypatch):
    row = {"name": "run", "images": 6, "few_for": 1280, "metrics": {"fid": 3.0}}
    row |= {"features": {"name": "four", "weights": "abc"}}
    job = SimpleNamespace(folder=tmp_path, sample_name="s")
    monkeypatch.setattr(show, "_float_rows", lambda job, row: [])
    show.print_row(job, [row])
    printed = capsys.readouterr().out
    assert "6 (few)" in printed
    assert "warning: (few) the Frechet distance of 6 images by 1280 features" in printed


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({}, True),
        ({"reference": {"content": "b"}}, False),
        ({"features": {"name": "five", "weights": "abc"}}, False),
        ({"weights": "others"}, False),
        ({"images": 7}, False),
        ({"config": {"sampler": {"method": {"steps": 9}}}}, False),
        ({"config": {"sampler": {"method": {"steps": 8}, "batch": 5}}}, True),
    ],
)
def test_the_float_models_row_stands_beside_one_that_compares(change, shown, capsys, tmp_path):
    """It may have been measured by other metrics."""
    features = {"name": "four", "weights": "abc"}
    row = {"name": "run", "images": 6, "features": features, "reference": {"content": "a"}}
    row |= {"config": {"sampler": {"method": {"steps": 8}}}, "weights": "w"}
    row |= {"metrics": {"fid": 3.0, "precision": 0.5}}
    place = tmp_path / "digits_fp" / "seed0" / "s" / "metrics.json"
    metrics = {"fid": 2.0, "kid_mean": 0.1}
    write_row(place, {**row, "name": "digits_fp", "metrics": metrics, **change})
    job = SimpleNamespace(folder=tmp_path / "run" / "seed0", sample_name="s", seed=0)
    job.config = {"model": {"label": "digits"}}
    show.print_row(job, [row])
    assert ("digits_fp" in capsys.readouterr().out) == shown


@pytest.mark.parametrize("model", ["digits", "ddim_small", "ldm_small"])
def test_what_is_shipped_is_found_before_the_run(model, tmp_path):
    job = jobs.build(compose([f"model={model}", f"out={tmp_path}", "eval=digits"]), source=False)
    require_inputs(job, download=False)
