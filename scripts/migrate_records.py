"""Rewrite the records of finished runs in today's names, and give every file its checksum.

    python scripts/migrate_records.py [results]      also: results/runs, or the folder of one run

A record's fingerprint is the hash of parts that lie in the record itself, so it can be computed
again when a name in them changes. For each run this script first computes every fingerprint of the
record as it stands and stops if one differs from what is recorded: what it cannot reproduce it does
not rewrite. Then it renames (`config.records.upgrade`), hashes again down the chain
fit < sample < measure, and rewrites fit.json, samples.json, metrics.json and the header of a packed
network; a layer map gets its present form. Every JSON file and row gets its seal, every file of
tensors its checksum; what an older row lacks (the hash of its image set) it goes on to lack.
Numbers, facts and images are not touched. A second call changes nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tdq_exp.config import records
from tdq_exp.config.compose import compose
from tdq_exp.config.schema import plain
from tdq_exp.diffusion import Ddim
from tdq_exp.experiment.record_checks import OTHERS
from tdq_exp.experiment.row import measure_parts, read_rows, write_rows
from tdq_exp.fit.calibration_options import IMPORTED
from tdq_exp.fit.ptq.calibration_set import CalibrationSpec
from tdq_exp.fit.quantized import layer_record
from tdq_exp.quant.convert import ATTENTION_INPUT
from tdq_exp.runtime import lock, tensor_files
from tdq_exp.runtime.files import fingerprint, read_json, sealed, write_json

Record = dict[str, Any]


def main() -> None:
    """Migrate every run below a folder."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "results")
    fits = sorted(root.rglob("fit.json"))

    data_sets = _distinct(_read(path)["parts"].get("data") for path in fits)
    changed = 0
    for path in fits:
        with lock.held(path.parent):
            changed += migrate(path.parent, data_sets)
    print(f"{changed} of {len(fits)} runs rewritten")

    # Shipped nets, and what other scripts measured.
    beside = [root.glob(f"{folder}/*") for folder in ("weights", "bench", "analysis")]
    for file in sorted(file for files in beside for file in files):
        add_checksum(file)


def migrate(run: Path, data_sets: list[Any]) -> bool:
    """Migrate one run; return whether anything changed.

    Args:
        run: its folder.
        data_sets: the `data` parts of all runs: a float model's record does not repeat its own.

    Raises:
        ValueError: if a fingerprint of the old record can't be reproduced.
    """
    before = _contents(run)
    old = _read(run / "fit.json")
    new = _new_fit(old, run / "fit.json")

    # Everything is computed before anything is written.
    files = sorted(run.glob("**/samples.json"))
    old_sets = {file: _read(file) for file in files}
    new_sets = {file: _new_samples(file, old_sets[file], old, new) for file in files}
    samples = {old_sets[file]["fingerprint"]: new_sets[file]["fingerprint"] for file in files}
    rows = {}
    for file in sorted(run.glob("**/metrics.json")):  # the best of several has no samples.json
        sets = [old["parts"].get("data"), *data_sets]
        found = read_rows(file)
        rows[file] = [_new_row(row, new["fingerprint"], samples, sets, file) for row in found]

    for file, content in new_sets.items():
        write_json(file, content)

    # Rows refer to the fit's record. If it changes, they are whole until it has.
    if new != old:
        for file in rows:
            write_json(file, {"rows": rows[file]})
    write_json(run / "fit.json", new)
    for file in rows:
        write_rows(file, rows[file])

    if (run / "layers.json").exists():
        _migrate_layers(run / "layers.json")
    if (run / "packed.safetensors").exists():
        _migrate_packed(run / "packed.safetensors", old, new)

    for file in sorted(run.rglob("*")):
        if not OTHERS.intersection(file.relative_to(run).parts):
            add_checksum(file)
    return _contents(run) != before


def add_checksum(file: Path) -> None:
    """Write a file that has no checksum again, with one; leave every other file as it is.

    Raises:
        ValueError: if a file is damaged.
    """
    if file.suffix == ".json" and file.name != "wandb-id.json":
        content = _read(file)
        if sealed(content) != json.loads(file.read_bytes()):
            write_json(file, content)
    elif file.suffix == ".safetensors":
        found = tensor_files.read_tensors(file)
        if not found.checked:
            tensor_files.write_tensors(file, found.tensors, found.metadata)
    elif file.suffix == ".pt" and not tensor_files.check_state(file):
        state = tensor_files.read_state(file)
        assert state is not None
        tensor_files.write_state(file, state)


def _migrate_layers(path: Path) -> None:
    content = _read(path)
    kinds = content.get("kinds")
    rows = content["layers"]
    if kinds is not None:
        rows = [{"layer": name, **kinds[kind]} for name, kind in rows]

    # What q, k and v read was once called a matrix of attention's, like their products.
    renamed = [
        row | {"role": ATTENTION_INPUT}
        if row["role"] == "attention_matrix" and row["layer"].endswith(".input")
        else row
        for row in rows
    ]
    write_json(path, content | layer_record(renamed))


def _new_fit(old: Record, path: Path) -> Record:
    _require(fingerprint(old["parts"]), old["fingerprint"], path)
    parts, config = records.upgrade(old["parts"]), _current(old["config"])

    # A calibration set's fingerprint is of the model's definition, among others; an imported one's
    # is of its samples alone.
    if "calibration" in parts and old["config"]["calibration"]["kind"] != IMPORTED:
        _require(_set_fingerprint(old["config"], old["parts"]), old["parts"]["calibration"], path)
        parts["calibration"] = _set_fingerprint(config, parts)

    return {**old, "config": config, "parts": parts, "fingerprint": fingerprint(parts)}


def _set_fingerprint(config: Record, parts: Record) -> str:
    c, s = config["calibration"], config["sampler"]
    spec = CalibrationSpec(c["kind"], c["samples"], c["images"], c["mu"], c["sigma"], c["seed"])
    trajectory = Ddim.without_noise(s)

    model = {"definition": parts["model"]["definition"]}
    if "autoencoder" in parts:
        model["autoencoder"] = parts["autoencoder"]
    return fingerprint(
        spec.parts(model, parts["weights"], asdict(trajectory), parts["data"]["train"])
    )


def _current(config: Record) -> Record:
    """Return a config in today's names: itself, if it has them."""
    upgraded = records.upgrade(config)
    return config if upgraded == config else _completed(upgraded)


def _completed(config: Record) -> Record:
    """Return a config with the keys that came after it, as its own choices have them today.

    Only keys that no fingerprint reads can be missing: the parts are recorded by themselves.
    """
    now = plain(compose([f"model={config['model']['label']}"]))
    return _filled(config, {**now, "fit": now["fit"] | {"export": None}})


def _filled(config: Record, defaults: Record) -> Record:
    added = {key: value for key, value in defaults.items() if key not in config}
    nested = ("protocol", "pretrain", "autoencoder", "qat", "ptq", "sampling")
    inner = {
        key: _filled(dict(value), defaults[key])
        for key, value in config.items()
        if key in nested and isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
    }
    machine = ("out", "plan_only", "go", "traceback", "tracker", "launcher")
    return {
        **config,
        **inner,
        **{key: value for key, value in added.items() if key not in machine},
    }


def _new_samples(path: Path, old: Record, fit: Record, new_fit: Record) -> Record:
    """Return the record of a sampled set in its new form."""
    _require(fingerprint(old["parts"]), old["fingerprint"], path)
    _require(old["parts"]["fit"], fit["fingerprint"], path)

    parts = {**records.upgrade(old["parts"]), "fit": new_fit["fingerprint"]}
    return {**old, "parts": parts, "fingerprint": fingerprint(parts)}


def _new_row(
    row: Record, fit: str, samples: Mapping[str, str], data_sets: list[Any], path: Path
) -> Record:
    """Return a row in its new form; `samples` are the sets' fingerprints, old -> new."""
    old = row["fingerprints"]
    if old["sample"] not in samples:
        raise ValueError(f"{path}: a row is of the set {old['sample']}, which is not here")
    sample = samples[old["sample"]]

    matching = [
        data
        for data in data_sets
        if data is not None and _measured(row, old["sample"], data) == old["measure"]
    ]
    if not matching:
        raise ValueError(f"{path}: the measurement's fingerprint can't be reproduced")

    fingerprints = {
        "fit": fit,
        "sample": sample,
        "measure": _measured(row, sample, matching[0]),
    }
    config = _current(row["config"])
    return sealed({**row, "config": config, "fingerprints": fingerprints})


def _measured(row: Record, sample: str, data: Any) -> str:
    features = [row["features"]["name"], row["features"]["weights"]]
    return fingerprint(measure_parts(sample, features, data, row["config"]["eval"]))


def _migrate_packed(path: Path, old: Record, new: Record) -> None:
    found = tensor_files.read_tensors(path)
    about = found.metadata

    _require(about["fit"], old["fingerprint"], path)
    config = json.loads(about["config"])
    current = about | {"fit": new["fingerprint"]}
    if _current(config) != config:
        current["config"] = json.dumps(_current(config))
    if current != about:
        tensor_files.write_tensors(path, found.tensors, current)


def _require(computed: str, recorded: str, path: Path) -> None:
    if computed != recorded:
        raise ValueError(f"{path}: its fingerprint is {recorded}, but its parts give {computed}")


def _read(path: Path) -> Record:
    content = read_json(path)
    if content is None:
        raise ValueError(f"{path}: is missing")
    return content


def _contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def _distinct(values: Any) -> list[Any]:
    distinct: list[Any] = []
    for value in values:
        if value is not None and value not in distinct:
            distinct.append(value)
    return distinct


if __name__ == "__main__":
    main()
