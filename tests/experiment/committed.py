"""The list of committed rows, with their hashes and the commands that make them; it only grows.

    python tests/experiment/committed.py      (make freeze-rows)

adds the rows of `results/runs` that are not listed yet. It changes nothing that is listed: a listed
row that is not there any more, or has another hash, is an error. A row is listed with the overrides
of its command line: what its name says, and values that its recorded configuration has and that
composition lacks. They must give the fingerprints of fit, sample and measure that are recorded.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tdq_exp.config import experiments, records, schema
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import fit_stage
from tdq_exp.experiment.build import Experiment
from tdq_exp.experiment.row import measure_parts, read_rows
from tdq_exp.experiment.sample_stage import sample_stage_of
from tdq_exp.runtime.files import fingerprint, read_json

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "results" / "runs"
LIST = Path(__file__).with_name("committed_rows.json")

Json = dict[str, Any]


def listed() -> Json:
    """Return the list: run -> its hashes and commands."""
    content: Json = json.loads(LIST.read_text())
    return content


@cache
def runs_with_a_row() -> tuple[str, ...]:
    """Return `<name>/seed<k>` of every run of `results/runs` that has a row."""
    rows = RUNS.rglob("metrics.json")
    return tuple(sorted({"/".join(file.relative_to(RUNS).parts[:2]) for file in rows}))


@cache
def record_of(run: str) -> Json:
    """Return the record of a run's fit."""
    return _read(RUNS / run / "fit.json")


def sets_of(run: str) -> Iterator[tuple[str, Json, Json]]:
    """Yield (name, record, feature network -> row) of every sampled set of a run."""
    for file in sorted((RUNS / run).rglob("metrics.json")):
        rows = {row["features"]["name"]: row for row in read_rows(file)}
        # The best of several checkpoints: the set is that of one of them.
        place = file.parent
        for row in rows.values():
            place = place / f"update{row['update']}" if "candidates" in row else place
        yield file.parent.relative_to(RUNS / run).as_posix(), _read(place / "samples.json"), rows


def fit_parts_of(job: Experiment, record: Json) -> Json:
    """Return the parts of a job's fit, on the data and the weights that a record names."""
    data = SimpleNamespace(parts=lambda: record["parts"].get("data"))
    data.train = SimpleNamespace(content=(record["parts"].get("data") or {}).get("train"))

    parts = fit_stage.fit_parts(job, data, record["parts"]["weights"])  # type: ignore[arg-type]
    plain: Json = json.loads(json.dumps(parts))
    return plain


@dataclass(frozen=True)
class Made:
    """What a command makes.

    Args:
        run: `<name>/seed<k>`.
        sample_name: of the sampled set.
        parts: of the fit.
        fingerprints: of fit, sample and measure.
    """

    run: str
    sample_name: str
    parts: Json
    fingerprints: dict[str, str]


def made_by(command: list[str], record: Json, row: Json) -> Made:
    """Return what a command makes, without making it.

    Args:
        command: overrides of the command line.
        record: of the fit, which names the weights and the training images.
        row: which names the images that it was measured against.
    """
    job = jobs.build(compose(command), source=False)
    parts = fit_parts_of(job, record)
    fit = fingerprint(parts)

    fitted, no_net = SimpleNamespace(fingerprint=fit), SimpleNamespace
    stage = sample_stage_of(job, fitted, Path(), no_net, row["update"])  # type: ignore[arg-type]
    sample = stage.record.fingerprint

    features = features_of(json.dumps(job.config["eval"]["features"]), job)
    data = data_sets()[row["reference"]["content"]]
    measure = measure_parts(sample, features, data, vars(job.evaluation))

    fingerprints = {"fit": fit, "sample": sample, "measure": fingerprint(measure)}
    return Made(f"{job.name}/seed{job.seed}", job.sample_name, parts, fingerprints)


_FEATURES: dict[str, list[str]] = {}


def features_of(node: str, job: Experiment) -> list[str]:
    """Return name and hash of a job's feature network, read once for all that name the same one."""
    if node not in _FEATURES:
        network = job.features()
        _FEATURES[node] = [network.name, network.weights_hash]
    return _FEATURES[node]


@cache
def data_sets() -> Json:
    """Return hash of the training images -> all parts of the images, from the records of fits.

    A float model that was only loaded does not record its own.
    """
    parts = (record_of(run)["parts"].get("data") for run in runs_with_a_row())
    return {data["train"]: data for data in parts if data is not None}


def command_of(run: str, config: Json) -> list[str]:
    """Return the overrides that a recorded configuration was composed of.

    Raises:
        ValueError: if the run's name does not say its choices.
    """
    config = records.upgrade(config)
    choices = experiments.choices_of(run.partition("/")[0])
    if choices is None:
        raise ValueError(f"{run}: its name is no experiment; explain its label in labels.yaml")

    command = [*choices, *([f"seed={config['seed']}"] if config["seed"] else [])]
    command += _values(schema.plain(compose(command)), config)

    # Steps change the sampler's label, so this is looked at last.
    recorded = config["sampler"]["label"]
    if compose(command).sampler.label != recorded:
        command.append(f"sampler.label={recorded}")
    return command


def _values(composed: Json, recorded: Json) -> list[str]:
    """Return `group.key=value` of what a record has, a result depends on, and choices do not give."""
    values = []
    for group in ("fit", "calibration", "sampler", "eval"):
        now, then = schema.parts_of(group, composed[group]), recorded[group]
        # The arguments of the sampler are keys of its group, too.
        now |= now.pop("method", {})
        then = then | then.get("method", {})

        values += [
            f"{group}.{key}={_text(then[key])}"
            for key in now
            if key in composed[group] and key in then and then[key] != now[key]
        ]
    return values


def _text(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(_text(entry) for entry in value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def freeze() -> list[str]:
    """Add every row that is not listed; return their names.

    Raises:
        ValueError: if a listed row is missing or has another hash; if a row's command can't be
            found, or gives other fingerprints than are recorded. Nothing is written then.
    """
    content = listed()
    _require_still_there(content)

    added = []
    for run in runs_with_a_row():
        record = record_of(run)
        entry = content.setdefault(run, {"fit": [None, record["fingerprint"]], "samples": {}})
        _require_same(run, entry["fit"][1], record["fingerprint"])

        for name, _, rows in sets_of(run):
            known = entry["samples"].setdefault(name, {})
            for features, row in rows.items():
                now = _hashes(row)
                if features in known:
                    _require_same(f"{run}/{name}", _current(known[features]), _current(now))
                    continue

                command = command_of(run, row["config"])
                _require_made_by(command, record, row, f"{run}/{name}")
                known[features] = {"command": shlex.join(command), **now}
                added.append(f"{run}/{name} ({features})")

    LIST.write_text(text_of(content))
    return added


def text_of(content: Json) -> str:
    """Return the list as JSON, a line for each run: a change shows, and the file stays small."""
    lines = (f"{json.dumps(run)}: {json.dumps(entry)}" for run, entry in content.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _hashes(row: Json) -> Json:
    """Return what is listed of a row that came after classes were named by their face."""
    hashes = {stage: [None, row["fingerprints"][stage]] for stage in ("measure", "sample")}
    return {"fid": row["metrics"].get("fid"), **hashes}


def _current(listed_row: Json) -> Json:
    """Return what a listed row has today."""
    hashes = {stage: listed_row[stage][1] for stage in ("measure", "sample")}
    return {"fid": listed_row["fid"], **hashes}


def _require_still_there(content: Json) -> None:
    missing = sorted(content.keys() - set(runs_with_a_row()))
    if missing:
        raise ValueError(f"{missing[0]}: is listed, and results/runs has no row of it")
    for run in content:
        there = {(name, features) for name, _, rows in sets_of(run) for features in rows}
        for name, rows in content[run]["samples"].items():
            for features in rows:
                if (name, features) not in there:
                    raise ValueError(f"{run}/{name}: is listed, and its row of {features} is gone")


def _require_same(where: str, was: Any, now: Any) -> None:
    if was != now:
        raise ValueError(f"{where}: {was} is listed, the row has {now}; a listed row never changes")


def _require_made_by(command: list[str], record: Json, row: Json, where: str) -> None:
    made = made_by(command, record, row).fingerprints
    wrong = [stage for stage in made if made[stage] != row["fingerprints"][stage]]
    if wrong:
        raise ValueError(
            f"{where}: {' '.join(command)} gives another {wrong[0]} fingerprint than is recorded"
            f" ({made[wrong[0]]}, {row['fingerprints'][wrong[0]]})"
        )


def _read(path: Path) -> Json:
    content = read_json(path)
    if content is None:
        raise ValueError(f"{path}: is missing")
    return content


if __name__ == "__main__":
    new = freeze()
    print("\n".join([*new, f"{len(new)} rows added to {LIST.relative_to(ROOT)}"]))
