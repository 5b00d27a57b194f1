"""Every wrong input is refused in one line, before a file is written."""

from __future__ import annotations

import os
from functools import lru_cache

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import inputs, pipeline
from tests.faults.wrong_inputs import BASE, COMPOSED, GRAMMAR, LATE


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_weights):
    """A folder with a pipe, a text file, an empty folder and weights."""
    folder = tmp_path_factory.mktemp("wrong")
    os.mkfifo(folder / "pipe")
    (folder / "text").write_text("no tensors")
    (folder / "empty").mkdir()
    (folder / "weights.safetensors").symlink_to(tiny_weights)
    return folder


@lru_cache
def composed(choices: tuple[str, ...]):
    """One composition for all mistakes that share their choices: it is what takes the time."""
    return compose([*BASE, *choices])


def with_values(cfg, overrides):
    """A composed config with more values, set as Hydra would set them."""
    changed = cfg.copy()
    for parsed in OverridesParser.create().parse_overrides(overrides):
        OmegaConf.update(changed, parsed.key_or_group, parsed.value(), force_add=parsed.is_add())
    return changed


def name(wrong) -> str:
    return " ".join(wrong.overrides)


def refusal(run) -> str:
    """The line with which something is refused; an exception of another kind is a traceback."""
    try:
        run()
    except (ValueError, OSError) as error:
        return str(error)
    return "nothing was refused"


def is_value(override: str) -> bool:
    key = override.partition("=")[0].lstrip("+")
    return "." in key or key in ("seed", "label", "out")


def share(cases):
    """One mistake for each key, and for each kind; all where `TDQ_FAULTS=all` asks for them."""
    if os.environ.get("TDQ_FAULTS") == "all":
        return cases

    keys, kinds, kept = set(), set(), []
    for wrong in cases:
        *choices, value = wrong.overrides
        key, kind = (*choices, value.partition("=")[0]), wrong.words[1:]
        if key not in keys or kind not in kinds:
            kept.append(wrong)
        keys.add(key)
        kinds.add(kind)
    return kept


@pytest.mark.parametrize("wrong", share(COMPOSED), ids=name)
def test_a_wrong_value_is_one_line_before_a_file_is_written(wrong, place):
    overrides = [text.replace("{folder}", str(place)) for text in wrong.overrides]
    values = [
        f"out={place / 'results'}",
        f"model.weights={place / 'weights.safetensors'}",
        *(override for override in overrides if is_value(override)),
    ]

    def run():
        choices = tuple(override for override in overrides if not is_value(override))
        try:
            cfg = with_values(composed(choices), values)
        except OmegaConfBaseException:
            cfg = compose([*BASE, *choices, *values])  # Hydra says what is wrong
        inputs.require_inputs(jobs.build(cfg), download=False)

    answer = refusal(run)
    assert "\n" not in answer
    for word in wrong.words:
        assert word.replace("{folder}", str(place)) in answer
    assert not (place / "results").exists()


@pytest.mark.parametrize("wrong", GRAMMAR, ids=name)
def test_what_hydra_can_not_read_is_one_line(wrong):
    answer = refusal(lambda: jobs.build(compose([*BASE, *wrong.overrides])))
    assert "\n" not in answer
    assert all(word in answer for word in wrong.words)


@pytest.mark.parametrize("wrong", LATE, ids=name)
def test_what_the_data_refuse_is_refused_before_a_file_is_written(wrong, place):
    weights = f"model.weights={place / 'weights.safetensors'}"
    cfg = compose([*BASE, weights, f"out={place / 'late'}", *wrong.overrides])
    answer = refusal(lambda: pipeline.run(jobs.build(cfg)))
    assert all(word in answer for word in wrong.words)
    assert not list(place.rglob("late/**/*.json"))
