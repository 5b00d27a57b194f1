"""Every experiment composes, instantiates, and is named after what it contains."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import tdq_exp.config.compose as compose_module
from tdq_exp.config import assets, experiments, naming, schema
from tdq_exp.config.compose import compose
from tdq_exp.diffusion import Ddim
from tdq_exp.diffusion.options import ModelConventions, TrajectoryOptions
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment.options import SamplerOptions
from tdq_exp.models import Ddpm, Pndm
from tdq_exp.report import manifest as manifests
from tests.experiment import committed

ROOT = assets.configs().parent
DOCUMENTED = experiments.documented()
LOCAL = ["model.weights=none.safetensors"]  # no shipped net is needed to build a job

MODELS = ("ddim", "ddim_small", "digits", "ldm", "ldm_small")
TABLE_1 = [
    *(f"{model}_fp" for model in MODELS),
    *(
        f"{model}_{bits}_{method}_release"
        for model in MODELS
        for bits in ("w8a8", "w4a8", "w8a4", "w4a4", "w3a3")
        for method in ("lsq", "pact", "nipq", "lsq_tdq")
    ),
]
TABLE_2 = [
    # In a latent model the matrices inside of attention stay float.
    f"{model}_{bits}_{method}{'_fattn' if model.startswith('ldm') else ''}"
    f"{'_uniform' if method.startswith('ptq4dm') else ''}"
    for model in MODELS
    for bits in ("w8a8", "w8a7", "w8a6", "w8a5", "w8a4", "w4a8", "w4a6")
    for method in ("minmax", "ptq4dm", "ptq4dm_tdq")
]

ROWS = sorted(path.name for path in (ROOT / "results" / "runs").iterdir())


def local(experiment):
    """Overrides with which an experiment is built without its nets."""
    return [
        *LOCAL,
        *(["model.autoencoder=none.safetensors"] if experiment.startswith("ldm") else []),
    ]


@pytest.mark.parametrize("name, names", [("table1", TABLE_1), ("table2", TABLE_2)])
def test_a_table_asks_for_every_cell_of_the_paper(name, names):
    manifest = manifests.read_manifest(name)
    asked = [
        sorted(
            f"{group}={option}" for group, option in manifest.choices(scale, column, line).items()
        )
        for scale in manifest.scales
        for column in manifest.at(scale)
        for line in (manifest.float_model, *manifest.lines)
    ]
    for run in names:
        # The set that MinMax's name stands for is chosen all the same: one line serves the table.
        implied = ["calibration=uniform"] if "minmax" in run else []
        assert sorted([*experiments.choices_of(run), *implied]) in asked


def test_every_argument_of_a_sampler_is_a_key_of_its_group_and_declared_once():
    shared = assets.read_yaml(assets.configs() / "sampler" / "shared" / "steps.yaml")
    declared = [field.name for field in dataclasses.fields(TrajectoryOptions)]
    assert shared["method"] == {name: f"${{sampler.{name}}}" for name in declared}
    for field in dataclasses.fields(ModelConventions):
        assert shared[field.name] == f"${{model.sampling.{field.name}}}"

    for made in (Ddim, Ddpm, Pndm):
        assert [field.name for field in dataclasses.fields(made)] == declared
    assert set(declared) < {field.name for field in dataclasses.fields(SamplerOptions)}


def test_the_papers_numbers_for_churches():
    cfg = compose(["+experiment=ldm_w4a4_lsq_tdq"])
    assert (cfg.fit.batch_size, cfg.fit.lr, cfg.fit.updates, cfg.fit.warmup) == (
        32,
        5e-5,
        200_000,
        5000,
    )
    assert (cfg.sampler.steps, cfg.sampler.images, cfg.sampler.offset) == (200, 50_000, 1)
    assert (
        cfg.model.definition.loss == "l1"
        and cfg.eval.metrics == ["fid"]
        and not cfg.sampler.final_alpha_one
    )
    assert cfg.data.source.path == "tglcourse/lsun_church_train"
    assert cfg.tdq.interval.encoding == 192  # the U-Net's base channels
    cfg = compose(["+experiment=ldm_w8a5_ptq4dm_tdq_float_attention"])
    assert (cfg.sampler.steps, cfg.calibration.samples, cfg.plan.plan.attention) == (
        100,
        5120,
        False,
    )


def test_what_a_latent_model_of_either_scale_denoises_and_decodes():
    for name, sample, image in (("ldm_fp", (4, 32, 32), 256), ("ldm_small_fp", (4, 8, 8), 32)):
        made = jobs.build(compose([f"+experiment={name}", *local(name)])).model
        assert (made.sample_shape, made.image_size, made.channels) == (sample, image, 3)


def test_the_small_latent_model_has_about_a_million_parameters_and_every_kind_of_block():
    made, paper = (
        jobs.make(compose([f"model={name}"]), "model.definition")
        for name in ("ldm_small", "ldm_churches")
    )
    assert sum(p.numel() for p in made.build().parameters()) == 1_150_868
    assert sum(p.numel() for p in made.autoencoder.build().parameters()) == 681_911
    for side in ("down_block_types", "up_block_types"):
        assert set(made.network[side]) == set(paper.network[side])


def test_post_training_quantization_samples_with_its_own_number_of_steps():
    assert compose(["+experiment=ddim_w8a5_ptq4dm_tdq"]).sampler.steps == 100
    assert compose(["+experiment=ddim_w4a4_lsq_tdq"]).sampler.steps == 200
    assert compose(["+experiment=ddim_w8a5_minmax", "sampler.steps=20"]).sampler.steps == 20


@pytest.mark.parametrize("name", DOCUMENTED)
def test_an_experiment_builds_and_is_named_after_what_it_contains(name):
    made = jobs.build(compose([f"+experiment={name}", *local(name)]))
    assert made.name == name.replace("float_attention", "fattn")
    assert (made.recipe is None) == name.endswith("_fp")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_experiment_opens_with_its_command_its_time_and_its_result(name):
    text = (assets.configs() / "experiment" / f"{name}.yaml").read_text()
    assert f"#   command   python -m tdq_exp.run +experiment={name}" in text
    assert "#   time " in text and "#   result " in text

    # What it says of the result is what the row says.
    row_file = re.search(r"results/runs/\S+metrics.json", text)
    if row_file is None:
        assert "no row yet" in text
    else:
        (row,) = json.loads((ROOT / row_file[0]).read_text())["rows"]
        assert (
            f"Frechet distance {row['metrics']['fid']:.2f} ({row['features']['name']} features)"
            in text
        )


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_experiment_is_the_choices_of_its_name(name):
    by_file = schema.plain(compose([f"+experiment={name}"]))
    by_name = schema.plain(compose(experiments.choices_of(name)))
    assert by_file == by_name


def _commands_of_rows():
    """Name of a run -> the commands of its committed rows, as words."""
    found = defaultdict(list)
    for run, listed in committed.listed().items():
        rows = (row for of_set in listed["samples"].values() for row in of_set.values())
        found[run.partition("/")[0]] += [shlex.split(row["command"]) for row in rows]
    return found


COMMANDS = _commands_of_rows()
NAMES = sorted({*TABLE_1[::8], *TABLE_2[::8], *ROWS})


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_row_is_an_experiment(name):
    choices = experiments.choices_of(name)

    # What a committed row's command composes to is compared with its record (test_committed_rows).
    if commands := COMMANDS.get(name):
        assert all(set(choices) <= set(command) for command in commands)
    else:
        assert naming.fit_name(compose(choices)) == name

    # What Hydra reads as `+experiment=NAME` are these choices and nothing else.
    if name not in DOCUMENTED:
        experiments.register([f"+experiment={name}"])
        node = ConfigStore.instance().load(f"experiment/{name}.yaml").node
        options = [next(iter(entry.items())) for entry in node.pop("defaults")]
        found = [f"{group.removeprefix('override /')}={option}" for group, option in options]
        values = {choice for choice in choices if not experiments.is_option(choice)}
        assert found == [choice for choice in choices if choice not in values]
        assert node == OmegaConf.from_dotlist(sorted(values))


def _few_with_every_choice(names):
    """Names that have all choices of all names together, each the one that adds most."""
    choices = {name: set(experiments.choices_of(name)) for name in names}
    missing = set().union(*choices.values())
    while missing:
        name = max(names, key=lambda name: len(choices[name] & missing))
        missing -= choices[name]
        yield name


@pytest.mark.parametrize("name", _few_with_every_choice(NAMES))
def test_hydra_reads_every_choice_of_a_name(name):
    assert naming.fit_name(compose([f"+experiment={name}"])) == name


@pytest.mark.parametrize(
    "name, choices",
    [
        ("digits_w4a4_lsq_s100", "model=digits bits=w4a4 method=lsq tdq=s100"),
        ("digits_w4a4_lsq", "model=digits bits=w4a4 method=lsq tdq=none"),
        ("ldm_small_fp_autoencoder", "model=ldm_small method=fp fit=pretrain_autoencoder"),
        (
            "digits_w4a4_lsq_release_hrelease",
            "model=digits bits=w4a4 method=lsq tdq=none plan=release habits=release",
        ),
        (
            "ddim_small_w8a8_ptq4dm_ndtc_published_adaround",
            "model=ddim_small bits=w8a8 method=ptq4dm tdq=none calibration=ndtc_published fit.rounding=adaround",
        ),
    ],
)
def test_a_name_is_read_back_into_choices(name, choices):
    assert experiments.choices_of(name) == choices.split()
    assert naming.fit_name(compose([f"+experiment={name}"])) == name


def _labelled(node):
    """Yield every list of overrides with a label, in manifests and claims."""
    if isinstance(node, list) and any(str(entry).startswith("label=") for entry in node):
        yield node
    elif isinstance(node, (list, dict)):
        for entry in node.values() if isinstance(node, dict) else node:
            yield from _labelled(entry)


def test_a_label_stands_for_the_values_that_manifests_give_it():
    """In this project; a user's own label may stand for anything."""
    explained = assets.read_yaml(assets.configs() / "labels.yaml")
    files = [*(assets.configs() / "table").glob("*.yaml"), assets.configs() / "claims.yaml"]
    lists = [entry for file in files for entry in _labelled(assets.read_yaml(file))]
    assert len(lists) > 5

    for overrides in lists:
        values = OmegaConf.from_dotlist(
            [entry for entry in overrides if "." in entry.split("=")[0]]
        )
        label = next(entry.partition("=")[2] for entry in overrides if entry.startswith("label="))
        values.pop("sampler", None)  # not of the fit, which is what has a name
        assert values == OmegaConf.from_dotlist(explained[label]["values"])


def test_a_label_of_values_is_one_of_the_models_that_it_names():
    assert experiments.choices_of("ddim_small_w4a4_lsq_rate30")[-1] == "label=rate30"
    assert experiments.choices_of("digits_w4a4_lsq_rate30") is None
    assert experiments.choices_of("digits_w4a4_lsq_mine") is None

    # Nor of a method, or with a set, whose run would not read the values.
    assert experiments.choices_of("ddim_small_w4a4_lsq_rate10") is None
    assert experiments.choices_of("ddim_small_w8a8_ptq4dm_mid_t")[-1] == "label=mid_t"
    for name in ("ptq4dm_uniform_mid_t", "minmax_mid_t", "ptq4dm_no_ema"):
        assert experiments.choices_of(f"ddim_small_w8a8_{name}") is None
    cfg = compose(["+experiment=digits_w4a4_lsq_tdq_u600"])
    assert cfg.fit.updates == 600 and naming.fit_name(cfg) == "digits_w4a4_lsq_tdq_u600"


@pytest.mark.parametrize(
    "text, said",
    [
        ("mine: fit.updates=3", "mine: write {values: [group.key=value]}"),
        ("mine: {value: [fit.updates=3]}", "mine: write {values"),
        ("mine: {values: fit.updates=3}", "mine: values must be a list of words"),
        ("mine: {values: [fit.updates: 3]}", "mine: values must be a list of words"),
        ("mine: {values: [600]}", "mine: values must be a list of words"),
        ("mine: {values: [fit.updates]}", "mine: fit.updates: must be group.key=value"),
        ("mine: {values: [bits=w8a8]}", "mine: bits=w8a8: must be group.key=value"),
        ("mine: {values: [fit.updates=3], models: [3, digits]}", "mine: models must be a list"),
        ("mine: {values: [fit.updates=3], models: [digit]}", "mine: digit: no such model"),
        ("mine: {values: [fit.updates=3], methods: [lqs]}", "mine: lqs: no such method"),
        ("s100: {values: [fit.lr=1e-4]}", "s100: is the label of an option already"),
        ("[mine]", "must be a list of `label: {values: [group.key=value]}`"),
    ],
)
def test_a_label_that_is_explained_otherwise_is_one_line(text, said, tmp_path, monkeypatch):
    shutil.copytree(assets.configs(), tmp_path / "configs")
    (tmp_path / "configs" / "labels.yaml").write_text(text)
    monkeypatch.setattr(assets, "configs", lambda: tmp_path / "configs")
    experiments._labels_of_values.cache_clear()
    try:
        with pytest.raises(ValueError, match=re.escape(said)):
            experiments.choices_of("digits_w4a4_lsq_mine")
    finally:
        experiments._labels_of_values.cache_clear()


def test_an_option_may_be_written_by_its_own_name_in_place_of_its_label():
    for own, label in (
        ("ldm_w8a5_ptq4dm_tdq_float_attention_uniform", "ldm_w8a5_ptq4dm_tdq_fattn_uniform"),
        ("digits_w4a4_lsq_temporal_release", "digits_w4a4_lsq_tdq_release"),
    ):
        assert experiments.choices_of(own) == experiments.choices_of(label)
        assert naming.fit_name(compose([f"+experiment={own}"])) == label


@pytest.mark.parametrize(
    "name", ["digits_lsq", "digits_w4a4_fp", "digits", "w4a4_lsq", "digits_w4a4_lsq_tdq_tdq", ""]
)
def test_what_is_no_name_of_a_run_is_no_experiment(name):
    assert experiments.choices_of(name) is None


def test_an_experiment_can_be_changed_and_swept():
    cfg = compose(["+experiment=digits_w8a5_ptq4dm_tdq", "bits=w4a8", "plan=float_attention"])
    assert naming.fit_name(cfg) == "digits_w4a8_ptq4dm_tdq_fattn"
    experiments.register(["+experiment=digits_w3a3_nipq,digits_fp"])
    with pytest.raises(ValueError, match="digits_w3a3_niqp: no such experiment"):
        experiments.register(["+experiment=digits_w3a3_nipq,digits_w3a3_niqp"])


@pytest.mark.parametrize("options", [[], ["-m"], ["--cfg", "job"]])
def test_a_misspelt_experiment_is_one_line_with_the_nearest_names(options):
    command = [sys.executable, "-m", "tdq_exp.run", *options, "+experiment=ddim_w4a4_lsq_tqd"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "ddim_w4a4_lsq_tqd: no such experiment; the nearest: ddim_w4a4_lsq_tdq," in done.stderr


def test_hydra_composes_an_experiment_that_has_no_file():
    command = [
        sys.executable,
        "-m",
        "tdq_exp.run",
        "--cfg",
        "job",
        "+experiment=digits_w3a3_nipq_tdq",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "label: w3a3" in done.stdout and "label: nipq" in done.stdout


def test_no_argument_is_the_demo():
    assert naming.fit_name(compose([])) == "digits_w4a4_lsq_tdq"


@pytest.mark.parametrize(
    "overrides, name",
    [
        (["tdq=s100"], "digits_w4a4_lsq_s100"),
        (["tdq=none", "plan=release", "habits=release"], "digits_w4a4_lsq_release_hrelease"),
        (["method=pact", "tdq=temporal", "plan=edge8"], "digits_w4a4_pact_tdq_edge8"),
        (["method=fp", "fit=pretrain"], "digits_fp_pretrain"),
        (
            ["weight=dorefa", "method=pact", "tdq=none", "label=mine"],
            "digits_w4a4_pact_dorefa_mine",
        ),
    ],
)
def test_whatever_differs_from_the_default_is_in_the_name(overrides, name):
    assert naming.fit_name(compose(overrides)) == name


@pytest.mark.parametrize(
    "experiment", ["ddim_w4a4_lsq_tdq", "ddim_small_w8a8_pact", "digits_fp", "ldm_w4a4_lsq"]
)
def test_smoke_shrinks_any_experiment(experiment):
    made = jobs.build(compose([f"+experiment={experiment}", "debug=smoke", *local(experiment)]))
    assert made.machine.smoke
    assert made.name == f"{experiment}_smoke"
    assert made.sampling.steps == 2


def test_a_rehearsal_never_takes_the_name_of_the_real_run():
    assert naming.fit_name(compose(["debug=smoke", "label=x"])) == "digits_w4a4_lsq_tdq_x_smoke"
    assert naming.fit_name(compose(["label=x"])) == "digits_w4a4_lsq_tdq_x"


@pytest.mark.parametrize("rule", ["lsq", "pact", "nipq"])
@pytest.mark.parametrize("interval", ["none", "temporal", "s1", "s10", "s1000", "dynamic"])
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
    assert "lr_schedule" not in schema.parts_of(
        "fit", fit
    )  # so that earlier rows are still rows of this fit
    assert schema.parts_of("fit", fit | {"lr_schedule": "cosine"})["lr_schedule"] == "cosine"


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=tiny", "out=/tmp/a b", "fit.lr=1e-4", "label='it s'", "data.limit=null"],
        ["+experiment=ddim_w4a4_lsq_tdq", "sampler.steps=${protocol.sampling.batch}"],
        ["method=ptq4dm", "calibration=forward", "eval.metrics=[fid]", "fit.memory_gb=1e-3"],
        ["+model.definition.network.num_class_embeds=3", "seed=4"],
    ],
)
def test_values_set_on_a_kept_composition_are_what_hydra_composes(overrides):
    found = compose(overrides)
    whole = compose_module._composed(tuple(overrides), compose_module.state_of_files())
    assert _typed_values(found) == _typed_values(whole)
    assert OmegaConf.is_struct(found) and OmegaConf.is_struct(whole)

    # A copy: what a caller changes is not kept.
    found.seed = 77
    assert compose(overrides).seed != 77


def test_an_option_of_an_independent_group_is_what_hydra_composes():
    files = compose_module.state_of_files()
    independent = compose_module._independent_groups(files)
    assert {"bits", "tdq", "plan", "habits"} <= independent
    assert not {"method", "model", "debug", "fit", "sampler", "calibration"} & independent

    # With the frames and the nodes of compositions that have not both.
    model = ("model=ddim_small", "method=lsq")
    for options in (
        (*model, "bits=w4a4", "tdq=temporal"),
        ("model=digits", "method=minmax", "bits=w8a6", "plan=edge8", "tdq=none", "habits=release"),
        (*model, "bits=w4a4", "tdq=none", "plan=release"),
    ):
        compose(options)
    for options in (
        (*model, "bits=w8a6", "tdq=none"),
        (*model, "tdq=none", "plan=edge8", "bits=w8a6"),
        (
            "method=minmax",
            "habits=release",
            "plan=release",
            "model=digits",
            "bits=w4a4",
            "tdq=none",
        ),
    ):
        before = compose_module._composed.cache_info().misses
        found = compose(options)
        assert compose_module._composed.cache_info().misses == before
        whole = compose_module._composed(options, files)
        assert _typed_values(found) == _typed_values(whole)
        assert OmegaConf.is_struct(found) and OmegaConf.is_struct(found.bits)

    with pytest.raises(ValueError, match="bits=w5a99|w5a99"):
        compose([*model, "bits=w5a99", "tdq=none"])


def _typed_values(node):
    if OmegaConf.is_dict(node):
        values = {key: _typed_values(node._get_node(key)) for key in node}
        return OmegaConf.get_type(node), values
    if OmegaConf.is_list(node):
        return [_typed_values(node._get_node(i)) for i in range(len(node))]
    return type(node), node._value()


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("sampler.step=20", "did you mean sampler.steps?"),
        ("methd=lsq", "did you mean method?"),
        ("updates=300", "did you mean fit.updates?"),
        ("method.zzz=3", "choices; an argument"),
        ("hydra.foo=1", "hydra.foo"),
        ("method/foo=lsq", "method/foo"),
    ],
)
def test_a_misspelt_key_is_told_with_the_nearest_one(override: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint)):
        compose(["model=digits", override])
