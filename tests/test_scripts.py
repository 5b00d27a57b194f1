"""Scripts that measure: what they report, on a case whose answer is known."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tdq_exp.config.compose import compose
from tdq_exp.diffusion import Ddim
from tdq_exp.diffusion.draws import image_generators, starting_noise
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline
from tdq_exp.fit.quantized import skeleton
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.quant.convert import activation_quantizers
from tdq_exp.quant.layers import QuantLayer
from tdq_exp.report import pages
from tdq_exp.runtime.context import RunContext
from tdq_exp.runtime.processes import Processes
from tests.fit.taped import Taped, record_on_tape
from tests.quant.builders import load_model, randn

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
RESULTS = SCRIPTS.parent / "results"


def script(name):
    spec = importlib.util.spec_from_file_location(Path(name).name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("limit", "beyond"), [(1.0, True), (1e5, False)])
def test_clipped_noise_tells_places_beyond_the_first_range_from_all_others(limit, beyond):
    """All is at 16 bits but for the first layer's input: there -1..1, which cuts, or codes 3 apart, which blur all places."""
    module = script("analysis/clipped_noise")
    overrides = [
        "bits.weight=16",
        "bits.act=16",
        "tdq=none",
        "sampler.steps=5",
        "tracker=none",
        "label=wide",
    ]
    made = jobs.build(compose(["model=tiny", "model.weights=none", *overrides]), source=False)
    net, float_net = skeleton(made.model, made.recipe), made.model.build().eval()
    for quantizer in activation_quantizers(net).values():
        quantizer.start(100 / 2**15, 2**15)
    for layer in net.modules():
        if isinstance(layer, QuantLayer):
            layer.weight_quantizer.start(2 / 2**15, 0)
    first = net.conv_in.input_quantizer
    first.start(limit / 2**15, 2**15)
    with torch.no_grad():
        low, high = (float(first(torch.tensor([[end]]))) for end in (-1e9, 1e9))
    assert high == pytest.approx(limit, rel=1e-3) and low == pytest.approx(-limit, rel=1e-3)
    x_t = starting_noise(image_generators(0, range(8)), made.model.sample_shape)
    as_it_is, freed = module.analyse(made, net, x_t, module.drawn(made, float_net, x_t))
    outside = [
        not low <= float(value) <= high for value in x_t.flatten()
    ]  # one channel: an element is a place
    counted = sum(outside) / len(outside)
    assert as_it_is["share"] == freed["share"] == pytest.approx(counted, abs=1e-3)
    assert freed["range"] == "float" and 3 * freed["error_elsewhere"] < as_it_is["error_elsewhere"]
    if beyond:
        assert 0.2 < counted < 0.5
        assert as_it_is["error_there"] > max(as_it_is["error_elsewhere"], 3 * freed["error_there"])
    else:
        assert counted == 0 and as_it_is["error_there"] is None


def test_the_house_is_measured(tmp_path):
    """A package of one long function with a blank and a comment line, and one of many parameters."""
    house = script("analysis/house")
    body = ["    x = 1", "", "    # why", *["    x += 1"] * 18, "    return x"]
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "long.py").write_text(
        "\n".join(["def long():", '    """Return 19.', "", '    """', *body]) + "\n"
    )
    (tmp_path / "inner").mkdir()
    lines = [
        "class A:",
        "    def wide(self, a, b, c, d, e, f, *, g):  # fmt: skip",
        f"        return a if self.fit.kind == {'q' * 80!r} else b",
    ]
    (tmp_path / "inner" / "wide.py").write_text("\n".join(lines) + "\n")

    measured = dict(house.measure(tmp_path).rows())
    assert measured["files"] == "3" and measured["modules at the top level"] == "1"
    assert measured["functions"] == "2" and measured["length of a function, longest"] == "26"
    assert measured["functions of 8 or more parameters"] == "1" and measured["`fmt: skip`"] == "1"
    assert (
        measured["lines over 100 columns"] == "1"
        and measured["lines that ask for a fit's kind"] == "1"
    )
    assert (
        measured["blank lines in long bodies"]
        == measured["comment lines in long bodies"]
        == "4.5 %"
    )

    text = list(house.table([tmp_path, house.PACKAGE]))
    assert len(text) == 2 + len(measured) and text[0].count("|") == 4


def test_a_report_is_its_figures_and_its_page(tmp_path, capsys):
    about = pages.about(threads=2)
    figures, page = pages.report(
        tmp_path / "new" / "speed", {"seconds": {"a": 1.5}}, about, ["# Speed", "a 1.5"]
    )
    assert page.read_text() == "# Speed\na 1.5\n" == capsys.readouterr().out
    content = json.loads(figures.read_text())
    assert (
        content["seconds"] == {"a": 1.5}
        and content["about"]["threads"] == 2
        and "commit" in content["about"]
    )


@pytest.mark.parametrize(
    "path", sorted(path.relative_to(SCRIPTS).as_posix() for path in SCRIPTS.rglob("*.py"))
)
def test_every_script_compiles_and_says_what_it_is_for(path):
    tree = ast.parse((SCRIPTS / path).read_text())
    assert ast.get_docstring(tree)


def test_the_numbers_of_the_results_page_are_those_of_its_rows():
    page = (RESULTS / "README.md").read_text()
    lines = re.findall(r"\| ([\d.]+) \| `(runs/\S+)` \|", page)
    assert len(lines) >= 10
    for number, folder in lines:
        (row,) = json.loads((RESULTS / folder / "metrics.json").read_text())["rows"]
        assert f"{row['metrics']['fid']:.2f}" == number, folder

    # A distance of two decimals is in a committed table, a row or a measurement.
    sources = [path.read_text() for path in (*RESULTS.glob("tables/*.md"), *RESULTS.glob("*/*.md"))]
    known = {number for text in sources for number in re.findall(r"\d+\.\d\d\b", text)}
    known |= {number for number, _ in lines}

    # Or it is a median of Figure 2.
    figure = json.loads((RESULTS / "numbers" / "figure2-small.json").read_text())
    for column in figure["columns"].values():
        known |= {f"{value:.2f}" for shares in column["held"].values() for value in shares.values()}

    assert set(re.findall(r"\b\d+\.\d\d\b", page)) <= known


def test_the_results_page_works_out_of_figures_what_their_numbers_give():
    page = " ".join((RESULTS / "README.md").read_text().split())

    def runs(figure, column="ddim"):
        record = json.loads((RESULTS / "numbers" / f"{figure}.json").read_text())
        return record["columns"][column]["runs"]

    # The largest step size over t by the smallest: the median of the layers.
    for scale in ("digits", "small"):
        ratios = []
        for run in runs(f"encoding-{scale}").values():
            widths = [
                [high - low for low, high in zip(q["grid_low"], q["grid_high"], strict=True)]
                for q in run["quantizers"].values()
            ]
            ratios.append(statistics.median(max(over_t) / min(over_t) for over_t in widths))
        encoded, raw = (f"{ratio:.2f} times" for ratio in ratios)
        assert f"the largest is {raw} the smallest" in page
        assert f"{encoded} with the encoding" in page or f"with the encoding {encoded}" in page

    # Truncation over all layers and t, and the error of x_0 that all quantizers make.
    for column in ("ddim", "ldm"):
        static, timed = runs("figure3-small", column).values()
        shares = [100 * statistics.fmean(run["truncation"]) for run in (timed, static)]
        assert re.search(rf"\({shares[0]:.2f} %, LSQ {shares[1]:.2f} %\)", page), shares
        static, timed = runs("layers-small", column).values()
        together = [f"{run['together']:.3f}" for run in (timed, static)]
        assert " and ".join(together) in page


def test_the_results_page_opens_with_the_verdicts_as_they_are_judged_now():
    claims = (RESULTS / "tables" / "claims-small.md").read_text().splitlines()
    table = [line for line in claims if line.startswith("|")]
    table = table[: 2 + sum(line.startswith("## ") for line in claims)]
    assert "\n".join(table) in (RESULTS / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "scripts/cluster/README.md"])
def test_what_a_page_links_to_is_there(page):
    path = SCRIPTS.parent / page
    links = [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text()) if "://" not in link]
    assert links and not [link for link in links if not (path.parent / link).exists()]


def test_the_symbol_table_of_the_readme_names_what_there_is():
    text = (SCRIPTS.parent / "tdq_exp" / "README.md").read_text()
    files = set(re.findall(r"`((?:quant|fit|models|data|diffusion)/[\w/.]*)`", text))
    assert len(files) > 12
    assert not [file for file in files if not (SCRIPTS.parent / "tdq_exp" / file).exists()]


def test_a_last_batch_of_fewer_images_has_the_weight_of_its_images(monkeypatch):
    module = script("analysis/prediction_bias")
    model = load_model("tiny")
    quantized, net = (Denoiser(model.build(seed=seed).eval(), model) for seed in (1, 2))
    found = []
    for batch in (2, 5):
        monkeypatch.setattr(module, "BATCH", batch)
        with torch.no_grad():
            found.append(module._of_run(quantized, net, Ddim(steps=3), 5))
    for name in ("rms", "bias", "steady", "share"):  # left and k are ratios of each batch
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name


@pytest.fixture
def rates(tmp_path, monkeypatch):
    """The search of rates, whose fits end with a loss that is a formula of their rates."""
    module = script("analysis/rates")

    def loss(job):
        assert job.folder.is_relative_to(tmp_path) and job.config["fit"]["updates"] == 7
        fit = job.config["fit"]
        return 1.0 + fit["lr_step_size"] - ("tdq" in job.name) * fit["lr_zero_point"]

    monkeypatch.setattr(module, "_validation_loss", loss)

    def search(**changed):
        options = {
            "overrides": ["model=tiny", "model.weights=none", "launcher=cpu"], "updates": 7,
            "factors": [0.5, 10.0], "rates": ["lr_step_size"], "methods": ["lsq", "lsq_tdq"],
            "work": tmp_path / "work", "out": tmp_path, "name": "page",
        }  # fmt: skip
        module.search(Namespace(**options | changed))

    return search


def test_a_search_of_rates_changes_one_at_a_time_for_all_methods_alike(rates, tmp_path):
    rates()
    measured = json.loads((tmp_path / "page.json").read_text())
    points = measured["points"]
    assert len(points) == 3
    now, half, tenfold = (
        points[name] for name in ("protocol", "lr_step_size_0.5", "lr_step_size_10")
    )
    assert half == {**now, "lr_step_size": now["lr_step_size"] / 2}
    assert tenfold == {**now, "lr_step_size": now["lr_step_size"] * 10}

    for method, zero_point in (("LSQ", 0.0), ("LSQ + TDQ", now["lr_zero_point"])):
        for name, of_point in points.items():
            wanted = 1 + of_point["lr_step_size"] - zero_point
            assert measured["losses"][method][name] == pytest.approx(wanted, rel=1e-3)

    # The change is the mean over methods.
    ratios = [of["lr_step_size_10"] / of["protocol"] for of in measured["losses"].values()]
    change = 100 * (statistics.fmean(ratios) - 1)
    assert f"| {change:+.2f} % |" in (tmp_path / "page.md").read_text()


def test_a_run_on_an_imported_set_is_migrated_though_no_config_gives_its_fingerprint(
    tmp_path, tiny_weights
):
    x, t = randn(6, 1, 8, 8), torch.tensor([0, 5, 999, 3, 3, 500])
    torch.save((x, t), tmp_path / "cali.pt")
    options = ["model=tiny", "method=minmax", "bits=w8a8", "launcher=cpu", "tracker=none"]
    places = [f"calibration.path={tmp_path}/cali.pt", f"out={tmp_path}", "fit.reconstruct=false"]
    job = jobs.build(compose([*options, *places, f"model.weights={tiny_weights}"]))
    pipeline.run(job)

    before = {file: file.read_bytes() for file in job.folder.rglob("*") if file.is_file()}
    assert not script("migrate_records").migrate(job.folder, [])
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"factors": [0.0]}, "--factors 0: must be"),
        ({"factors": [1.0]}, "--factors 1: must be"),
        ({"factors": [float("nan")]}, "--factors nan: must be"),
        ({"factors": [10.0, 10.001]}, "the same three digits"),
        ({"overrides": ["model=tiny", "label=x"]}, "label=x: the search sets it itself"),
    ],
)
def test_a_search_of_rates_refuses_before_it_fits(changed, words, rates, tmp_path):
    with pytest.raises(ValueError, match=words):
        rates(**changed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("with_integers", "said"), [(9.0, "beat simul"), (9.9, "DO NOT BEAT"), (11.0, "DO NOT BEAT")]
)
def test_the_gpus_bench_compares_integers_with_the_fastest_simulated_step(with_integers, said):
    module = script("bench/gpu_integer")
    steps = {
        (module.SIMULATED, "float32"): 50.0,
        (module.SIMULATED, "bfloat16"): 12.0,
        (module.LAST, "bfloat16"): 10.0,
        (module.ALL, "bfloat16"): with_integers,
        (module.CHOSEN, "float32"): 20.0,
    }
    milliseconds = {module.name_of(*key): {"median": ms} for key, ms in steps.items()}
    precisions = ("float32", "tf32", "bfloat16")
    line = module.verdict(milliseconds, precisions)
    assert said in line and "10.000 ms (bfloat16, simulated, channels-last)" in line
    assert module.verdict({}, precisions) == "not measured"

    entry = {"names": ["a", "b"], "shape": "Conv2d", "simulated": 2e-3, "error": None}
    entries = [entry | {"integer": 1e-3}, entry | {"integer": None, "error": "too large"}]
    entries.append(entry | {"simulated": None, "integer": None, "error": "too slow"})
    page = "\n".join(module.page({"integers": {"bfloat16": entries}, "about": {"integers": line}}))
    assert said in page and "| 2 | 2.0000 | 1.0000 | 2.00 |" in page and "(too large)" in page
    assert "(too slow) | 2 | - | - | - |" in page
    assert module.page({"about": {}}) == []


@pytest.fixture
def gpu_bench(tmp_path, monkeypatch):
    """The bench of a GPU at its tiny size, and what it is run with."""
    monkeypatch.syspath_prepend(SCRIPTS / "bench")
    module = script("bench/gpu")
    options = Namespace(rehearse=True, out=tmp_path, seconds=600, only=[])
    return module, module.Bench(options)


def test_the_loop_of_a_fit_is_timed_in_one_phase(gpu_bench, tmp_path):
    """At a new phase it records again, which would be among the updates whose mean is taken."""
    module, _ = gpu_bench
    options = module.fit_options(60, 4, 1e-6)
    context = RunContext(tmp_path, "", 0, Processes(cpu=True), tmp_path)
    model = load_model("tiny")
    training = module.training_of(model, model.build(), options, context)
    assert {training.phase(update) for update in range(60)} == {0}


@pytest.mark.parametrize("part", ["savings", "loop"])
def test_memory_is_measured_with_nothing_of_the_form_before(gpu_bench, monkeypatch, part):
    record_on_tape(monkeypatch)
    module, bench = gpu_bench
    networks, alive, build = weakref.WeakSet(), [], module.built

    def built(*arguments):
        net = build(*arguments)
        networks.add(net)
        return net

    def measured(name, step, rounds):
        alive.append((len(networks), len(Taped.alive)))

    monkeypatch.setattr(module, "built", built)
    monkeypatch.setattr(bench, "_timed_on_cpu", measured)
    job = {"savings": ("ldm_w4a4_lsq_tdq", "tiny_latent"), "loop": ("ddim_w4a4_lsq_tdq", "tiny")}
    getattr(module, part)(bench, module._job(*job[part]), "float32", 2)

    # The network, and in each form recordings of the gradients and of the step.
    recordings = {"savings": [2, 2], "loop": [0, 0, 2]}
    assert alive == [(1, number) for number in recordings[part]] and not bench.results["failed"]


def test_an_eager_step_is_measured_without_the_recorded_one(gpu_bench, monkeypatch):
    record_on_tape(monkeypatch)
    module, bench = gpu_bench
    alive, job = [], module._job("ddim_w4a4_lsq_tdq", "tiny")
    monkeypatch.setattr(bench, "_timed_on_cpu", lambda *step: alive.append(len(Taped.alive)))
    x = torch.zeros(1, *job.model.sample_shape)
    module._denoise(bench, job, "denoise ddim float", job.model.build(), x, "float32")
    assert alive == [1, 0] and not bench.results["failed"]


@pytest.mark.parametrize(
    ("limit", "spent", "code", "asked", "line"),
    [
        (465, 0, 0, (200, 465), "bench: exit code 0"),
        (100, 0, 0, (40, 100), "bench: exit code 0"),
        (60, 0, 2, (), "LIMIT=60: too short"),
        (100, 90, 1, (40,), " of 100 seconds are left"),
    ],
)
def test_the_check_of_a_gpu_keeps_its_limit(tmp_path, limit, spent, code, asked, line):
    """A limit of 0 or less would be none. Nothing is run: commands are written down."""
    commands = tmp_path / "asked"
    commands.touch()
    (tmp_path / "functions").write_text(
        f"timeout() {{ echo \"$*\" >> '{commands}'; }}\n"
        f"no_python() {{ SECONDS=$((SECONDS + {spent})); false; }}\n"
    )
    done = subprocess.run(
        ["bash", SCRIPTS / "gpu_check.sh", "no_python"],
        env={
            "PATH": os.environ["PATH"], "BASH_ENV": str(tmp_path / "functions"),
            "LIMIT": str(limit), "OUT": str(tmp_path / "out"),
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == code and line in done.stdout + done.stderr
    found = commands.read_text().splitlines()
    assert len(found) == len(asked)
    if asked:
        assert found[0].startswith(f"-s INT -k 10 {asked[0]} no_python") and "pytest" in found[0]
    if asked[1:]:
        # Whatever of the limit is left: on a busy machine a few seconds have gone by.
        (left,) = (n for n in range(asked[1] - 20, asked[1] + 1) if found[1].startswith(f"{n} no"))
        assert f"--seconds {left - 40}" in found[1]
