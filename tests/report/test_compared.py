"""Every key of a configuration is compared between a row and its cell, or named here with a reason."""

import copy
import dataclasses

import pytest

from tdq_exp.config.schema import Config
from tdq_exp.fit.registry import OPTIONS
from tdq_exp.report.compared import compared, compared_of_fit
from tdq_exp.runtime.stage import differences

NAME = "a name, part of a folder's"
SAMPLER = "`sampler.method` has it"
ELSEWHERE = "other groups read it by interpolation, and are compared"
MACHINE = "where and how fast"

# Keys that no row depends on, beside labels; of a group as a whole, its name.
NOT_COMPARED = {
    "protocol": ELSEWHERE,
    "method.calibration": NAME,
    "tracker": MACHINE,
    "launcher": MACHINE,
    "out": MACHINE,
    "plan_only": MACHINE,
    "traceback": MACHINE,
    "go": MACHINE,
    "smoke": NAME,
    "model.weights": "a path; its content by `Cell.contents`",
    "model.autoencoder": "a path; its content by `Cell.contents`",
    "model.sampling": SAMPLER,
    "data.cache": MACHINE,
    "calibration.path": "a set whose record has the same keys, or one of the kind `imported`",
    "sampler.steps": SAMPLER,
    "sampler.spacing": SAMPLER,
    "sampler.eta": SAMPLER,
    "sampler.clip": SAMPLER,
    "sampler.offset": SAMPLER,
    "sampler.final_alpha_one": SAMPLER,
    "sampler.images": "fewer of them make a short row, which is marked as one",
    "sampler.png": "a copy for readers",
    "fit.stop_after": "a rehearsal of a kill",
    "fit.memory_gb": MACHINE,
}
QUANTIZED = {"bits", "weight", "act", "tdq", "plan", "habits", "fit", "calibration"}
KINDS = [kind for kind, options in OPTIONS.items() if options.gives_rows]


def plain_config(kind: str) -> dict:
    """A configuration of a kind of fit, without what its options would choose."""
    config = plain_node(Config)
    config["fit"] = {**plain_node(OPTIONS[kind]), "kind": kind}
    config["method"]["quantized"] = OPTIONS[kind].quantizes
    config["data"]["source"] = {"_target_": "tdq_exp.data.Folder", "path": "here", "holdout": 20}
    config["eval"]["features"] = {"_target_": "tdq_exp.metrics.digits", "weights": "here"}
    return config


def plain_node(node: type) -> dict:
    """The defaults of a dataclass; `-` where it has none."""
    return {field.name: default_of(field) for field in dataclasses.fields(node)}


def default_of(field):
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return plain_node(type(made)) if dataclasses.is_dataclass(made) else made
    return "-" if field.default in (dataclasses.MISSING, "???") else field.default


def keys_of(kind: str) -> list[tuple[str, bool]]:
    """Every key of the root and of its groups, and whether it is a label."""
    keys = []
    for node in dataclasses.fields(Config):
        group = OPTIONS[kind] if node.name == "fit" else node.default_factory
        if group is dataclasses.MISSING:
            keys.append((node.name, bool(node.metadata.get("is_name"))))
            continue
        keys += [
            (f"{node.name}.{field.name}", bool(field.metadata.get("is_name")))
            for field in dataclasses.fields(group)
        ]
    return keys


def changed(config: dict, key: str, value: object = ("changed",)) -> dict:
    config = copy.deepcopy(config)
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    old = node[last]
    # A node keeps its form: its class is another one.
    node[last] = {**old, "_target_": "other"} if isinstance(old, dict) else list(value)
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_that_there_is_is_compared_or_has_a_reason(kind):
    config = plain_config(kind)
    quantized = OPTIONS[kind].quantizes

    for key, is_label in keys_of(kind):
        group = key.partition(".")[0]
        if key in ("fit.kind", "method.quantized"):  # they decide which keys there are
            continue
        excused = is_label or bool({group, key} & NOT_COMPARED.keys())
        # A float model is loaded as it is, and only some fits are shown a calibration set.
        excused |= group in QUANTIZED and not quantized
        excused |= group == "calibration" and not OPTIONS[kind].needs_calibration_set

        seen = differences(compared(config), compared(changed(config, key)))
        assert bool(seen) != excused, f"{key}: {seen or 'is not compared, and has no reason'}"
        assert all(line.startswith(key) for line in seen), seen


def test_no_reason_outlives_its_key():
    keys = {key for kind in KINDS for key, _ in keys_of(kind)}
    groups = {key.partition(".")[0] for key in keys}
    assert NOT_COMPARED.keys() <= keys | groups


def test_other_images_and_other_weights_make_a_row_stale_and_paths_do_not():
    config = plain_config("qat")

    def seen(key, value):
        other = copy.deepcopy(config)
        *parents, last = key.split(".")
        node = other
        for parent in parents:
            node = node[parent]
        node[last] = value
        return differences(compared(other), compared(config))

    assert seen("data.limit", 100) == ["data.limit: 100 -> None"]
    assert seen("data.source.holdout", 5) == ["data.source.holdout: 5 -> 20"]
    assert seen("model.ema", False) == ["model.ema: False -> True"]
    assert seen("seed", 1) == ["seed: 1 -> 0"]
    assert seen("fit.report", "best_of_5") == ["fit.report: best_of_5 -> last"]
    assert seen("data.source.path", "there") == seen("eval.features.weights", "there") == []
    assert seen("eval.metrics", ["kid", "fid", "isc"]) == [], "their order means nothing"
    assert compared(config) == compared(copy.deepcopy(config))


def test_a_key_that_an_older_row_lacks_is_one_without_a_value():
    older = plain_config("qat")
    del older["data"]["limit"]
    assert compared(older) == compared(plain_config("qat"))
    del older["fit"]["grad_clip"]
    assert differences(compared(older), compared(plain_config("qat"))) == [
        "fit.grad_clip: None -> 0.0"
    ]


def test_the_network_of_a_figure_is_of_any_sampler_and_report():
    config = plain_config("qat")
    for key in ("sampler.batch", "eval.batch", "fit.report"):
        assert compared_of_fit(changed(config, key)) == compared_of_fit(config), key
    for key in ("seed", "data.limit", "fit.lr", "model.ema"):
        assert compared_of_fit(changed(config, key)) != compared_of_fit(config), key
