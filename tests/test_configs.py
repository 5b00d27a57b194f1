"""Every experiment composes, instantiates, and is named after what it contains."""

from __future__ import annotations

import pytest

from tdq_exp.config import assets, naming, schema
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.report import cells as tables

EXPERIMENTS = sorted(path.stem for path in (assets.configs() / "experiment").glob("*.yaml"))
LOCAL = ["model.weights=none.safetensors"]  # no shipped net is needed to build a job


def local(experiment):
    """Overrides with which an experiment is built without its nets."""
    return [*LOCAL, *(["model.autoencoder=none.safetensors"] if experiment.startswith("ldm") else [])]


def test_every_cell_of_table_1_has_an_experiment():
    wanted = {
        f"{model}_{bits}_{method}"
        for model in ("ddim", "ddim_small", "digits", "ldm", "ldm_small")
        for bits in ("w8a8", "w4a8", "w8a4", "w4a4", "w3a3")
        for method in ("lsq", "pact", "nipq", "lsq_tdq")
    } | {"ddim_fp", "ddim_small_fp", "digits_fp", "ldm_fp", "ldm_small_fp"}
    assert wanted <= set(EXPERIMENTS)


def test_every_cell_of_table_2_has_an_experiment():
    wanted = {
        f"{model}_{bits}_{method}"
        for model in ("ddim", "ddim_small", "digits")
        for bits in ("w8a8", "w8a7", "w8a6", "w8a5", "w8a4", "w4a8", "w4a6")
        for method in ("minmax", "ptq4dm", "ptq4dm_tdq")
    }
    wanted |= {  # in a latent model the matrices inside of attention stay float
        f"{model}_{bits}_{method}_fattn"
        for model in ("ldm", "ldm_small")
        for bits in ("w8a8", "w8a7", "w8a6", "w8a5", "w8a4", "w4a8", "w4a6")
        for method in ("minmax", "ptq4dm", "ptq4dm_tdq")
    }
    assert wanted <= set(EXPERIMENTS)


@pytest.mark.parametrize("table", sorted(path.stem for path in (assets.configs() / "table").glob("*.yaml")))
def test_every_line_of_a_table_is_an_experiment(table):
    manifest = tables.read_manifest(table)
    lines = (manifest.float_model, *manifest.lines)
    wanted = {
        f"{model}_{line.experiment}{column.suffix if line is not manifest.float_model else ''}"
        for column in manifest.columns.values() for model in column.scales.values() for line in lines
    }  # fmt: skip
    assert wanted <= set(EXPERIMENTS)


def test_the_papers_numbers_for_churches():
    cfg = compose(["+experiment=ldm_w4a4_lsq_tdq"])
    assert (cfg.fit.batch_size, cfg.fit.lr, cfg.fit.updates, cfg.fit.warmup) == (32, 5e-5, 200_000, 5000)
    assert (cfg.sampler.steps, cfg.sampler.images, cfg.sampler.offset) == (200, 50_000, 1)
    assert cfg.model.definition.loss == "l1" and cfg.eval.metrics == ["fid"] and not cfg.sampler.final_alpha_one
    assert cfg.data.source.path == "tglcourse/lsun_church_train"
    assert cfg.tdq.interval.encoding == 192  # the U-Net's base channels
    cfg = compose(["+experiment=ldm_w8a5_ptq4dm_tdq_fattn"])
    assert (cfg.sampler.steps, cfg.calibration.samples, cfg.plan.plan.attention) == (100, 5120, False)


def test_what_a_latent_model_of_either_scale_denoises_and_decodes():
    for name, sample, image in (("ldm_fp", (4, 32, 32), 256), ("ldm_small_fp", (4, 8, 8), 32)):
        made = jobs.build(compose([f"+experiment={name}", *local(name)])).model
        assert (made.sample_shape, made.image_size, made.channels) == (sample, image, 3)


def test_the_small_latent_model_has_about_a_million_parameters_and_every_kind_of_block():
    made, paper = (jobs.make(compose([f"model={name}"]), "model.definition") for name in ("ldm_small", "ldm_churches"))
    assert sum(p.numel() for p in made.build().parameters()) == 1_150_868
    assert sum(p.numel() for p in made.autoencoder.build().parameters()) == 681_911
    for side in ("down_block_types", "up_block_types"):
        assert set(made.network[side]) == set(paper.network[side])


def test_post_training_quantization_samples_with_its_own_number_of_steps():
    assert compose(["+experiment=ddim_w8a5_ptq4dm_tdq"]).sampler.steps == 100
    assert compose(["+experiment=ddim_w4a4_lsq_tdq"]).sampler.steps == 200
    assert compose(["+experiment=ddim_w8a5_minmax", "sampler.steps=20"]).sampler.steps == 20


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_builds_and_is_named_after_what_it_contains(name):
    made = jobs.build(compose([f"+experiment={name}", *local(name)]))
    assert made.name == name
    assert (made.recipe is None) == name.endswith("_fp")
    first = (assets.configs() / "experiment" / f"{name}.yaml").read_text().splitlines()[1]
    assert first == f"# python -m tdq_exp.run +experiment={name}"


def test_no_argument_is_the_demo():
    assert naming.fit_name(compose([])) == "digits_w4a4_lsq_tdq"


@pytest.mark.parametrize(
    "overrides, name",
    [
        (["tdq=s100"], "digits_w4a4_lsq_s100"),
        (["tdq=none", "plan=release", "habits=release"], "digits_w4a4_lsq_release_hrelease"),
        (["method=pact", "tdq=temporal", "plan=edge8"], "digits_w4a4_pact_tdq_edge8"),
        (["method=fp", "fit=pretrain"], "digits_fp_pretrain"),
        (["weight=dorefa", "method=pact", "tdq=none", "label=mine"], "digits_w4a4_pact_dorefa_mine"),
    ],
)
def test_whatever_differs_from_the_default_is_in_the_name(overrides, name):
    assert naming.fit_name(compose(overrides)) == name


@pytest.mark.parametrize("experiment", ["ddim_w4a4_lsq_tdq", "ddim_small_w8a8_pact", "digits_fp", "ldm_w4a4_lsq"])
def test_smoke_shrinks_any_experiment(experiment):
    made = jobs.build(compose([f"+experiment={experiment}", "debug=smoke", *local(experiment)]))
    assert made.machine.smoke
    assert made.name == f"{experiment}_smoke"
    assert made.sampling.steps == 2


@pytest.mark.parametrize("rule", ["lsq", "pact", "nipq"])
@pytest.mark.parametrize("interval", ["none", "temporal", "s1", "s10", "s1000"])
def test_every_rule_takes_every_interval(rule, interval):
    made = jobs.build(compose(["model=tiny", f"method={rule}", f"tdq={interval}", *LOCAL]))
    assert made.recipe is not None


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["bitz=w4a4"], "bitz"),
        (["bits=w9a9"], "bits/w9a9"),
        (["bits.weight=0"], "bits.weight=0"),
        (["bits.act=1"], "bits.act=1"),
        (["bits.act=17"], "bits.act=17"),
        (["bits.act=3.5"], "bits.act=3.5"),
        (["fit.batch_size=0"], "fit.batch_size=0"),
        (["fit.batch_size=many"], "fit.batch_size"),
        (["sampler.steps=1001"], "sampler.steps=1001"),
        (["sampler.images=0"], "sampler.images=0"),
        (["data.limit=0"], "data.limit=0"),
        (["weight.interval=temporal"], "weight.interval='temporal'"),
        (["tdq.zero_point=sideways"], "tdq.zero_point='sideways'"),
        (["fit.report=best"], "fit.report='best'"),
        (["fit=pretrain"], "fit.kind=pretrain"),
        (["tdq.interval.widht=3"], "widht"),
        (["plan.plan.keep_float=[frist]"], "frist"),
        (["launcher.nproc=-1"], "launcher.nproc"),
        (["data=image_folder"], "data.source.path"),
        (["data=image_folder", "data.source.path=/no/such/folder"], "/no/such/folder"),
        (["data=cifar10", "data.source.path=/no/such/folder"], "/no/such/folder"),
        (["fit.precision=float16"], "fit.precision"),
        (["habits.habits.start=random"], "start='random'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(overrides, said):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        jobs.build(compose([*LOCAL, *overrides]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_came_later_is_a_part_only_where_it_differs():
    fit = schema.plain(compose([]).fit)
    assert fit["lr_schedule"] == "constant"
    assert "lr_schedule" not in schema.parts_of("fit", fit)  # so that earlier rows are still rows of this fit
    assert schema.parts_of("fit", fit | {"lr_schedule": "cosine"})["lr_schedule"] == "cosine"
