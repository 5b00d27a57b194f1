"""Every key that a command line may name is explained."""

from __future__ import annotations

import pytest

from tdq_exp.commands import explain
from tdq_exp.config import assets, schema
from tdq_exp.config.compose import compose
from tdq_exp.experiment.explained import Key, keys_of

# Options of groups that go with any other; those of `fit` and `protocol` are chosen by others.
OPTIONS = {
    group: [path.stem for path in sorted((assets.configs() / group).glob("*.yaml"))]
    for group in schema.groups()
    if group not in ("fit", "protocol", "calibration")
}


def explained(*overrides):
    return {key.name: key for key in keys_of(schema.plain(compose(overrides)))}


@pytest.mark.parametrize("number", range(max(len(options) for options in OPTIONS.values())))
def test_every_key_of_every_option_has_a_meaning(number):
    """The first option of every group at once, then the second of each, and so on."""
    together = [f"{group}={names[number % len(names)]}" for group, names in OPTIONS.items()]
    assert [name for name, key in explained(*together).items() if not key.meaning] == []


def test_a_key_is_explained_with_its_value_and_its_range():
    found = explained("bits=w4a8", "fit.grad_clip=1")
    assert found["bits.act"] == Key("bits.act", "8", ">= 2, <= 16", "bits of activations")
    assert found["fit.grad_clip"].value == "1.0" and found["fit.warmup"].limits == ">= 0, <= 1e+09"
    assert found["fit.lr_schedule"].limits == "constant, cosine"
    assert found["seed"].limits == ">= 0"  # whose largest value is that of the generators
    assert found["eval.metrics"].value == "[fid,isc,kid]" and found["data.limit"].value == "null"
    assert found["model.definition.network"].value.endswith(" keys)")


def test_an_argument_is_explained_by_the_class_that_takes_it():
    found = explained("tdq=temporal")
    assert found["tdq.interval.layers"].meaning.startswith("linear layers of f")
    assert found["tdq.interval._target_"].meaning.startswith("Give every activation quantizer")
    assert found["model.definition.schedule.steps"].meaning.startswith("T, the number of time")
    assert found["eval.features.weights"].meaning.startswith("The safetensors file")  # a function

    # One that the configuration leaves at its default, and how it is set.
    assert found["plan.plan.edge_bits"] == Key(
        "plan.plan.edge_bits",
        "null",
        "with +plan.plan.edge_bits=",
        "bits of the first and last layer, weights and input; None: as all others.",
    )
    assert found["plan.plan.keep_float"].value == "[]"


def test_the_keys_of_a_fit_are_those_of_its_kind():
    assert "fit.reconstruct" in explained("method=ptq4dm")
    assert "fit.reconstruct" not in explained("method=lsq")


def test_a_class_that_is_not_there_has_no_meaning_and_its_keys_are_shown():
    found = explained("data.source._target_=no.such.Source", "+data.source.size=3")
    assert found["data.source.size"] == Key("data.source.size", "3", "", "")


def test_words_choose_groups_and_keys_and_others_are_overrides(capsys):
    assert explain.main(["fit.lr", "bits", "bits=w3a3"]) == 0
    out = capsys.readouterr().out
    shown = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert [name for name in shown if name] == ["bits.label", "bits.weight", "bits.act", "fit.lr"]
    assert "w3a3" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (["fit.lrr"], "fit.lrr: no such key; the nearest: fit.lr, "),
        (["samplr"], "samplr: no such key; the nearest: sampler, "),
        (["fit", "bitz=w4a4"], "bitz"),
        (["fit", "fit.lr=-1"], "fit.lr=-1"),
    ],
)
def test_a_wrong_word_is_one_line(words, said, capsys):
    assert explain.main(words) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out
