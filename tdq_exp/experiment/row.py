"""A row: what a run found out, and all that somebody needs to know in order to compare it.

Rows are written by the measure stage into `metrics.json` beside the images, and read by tables.

The configuration of a row is mostly that of its fit, which `fit.json` above it holds: the file of
rows names those groups (`AS_FIT`) in place of repeating them, and reading puts them back. A row's
seal is of the whole row, so that a row beside another fit's record is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from tdq_exp.config import records
from tdq_exp.config.naming import FIT_RECORD
from tdq_exp.runtime import files
from tdq_exp.runtime.failures import AnotherResultError
from tdq_exp.runtime.stage import as_recorded, differences, listed

AS_FIT = "config_as_fit"  # key of a row in its file: the groups that the fit's record holds alike
OF_THE_SET = ("sampler", "eval")  # groups in which sets of one fit differ: a row holds its own
NEEDED = {"config", "features", "images", "metrics"}
REAL = ("held_out", "reconstructed")  # sets of real images that are measured beside the sampled one


@dataclass(frozen=True)
class Row:
    """One measured set of images.

    Args:
        name: of the run; the folder is called by it.
        seed: of the fit.
        sample: name of the sampled set, and of its folder.
        report: `last`, or `best_of_5`: the best of five checkpoints by the distance itself.
        update: of the checkpoint that the images are of; None for the last network.
        fingerprints: of the stages `fit`, `sample` and `measure`.
        images: how many were sampled.
        image_set: hash of the sampled pixels (see `images_hash`). Older rows have none.
        weights: content hash of the float network.
        model_parts: content hashes of other parts of the model, such as `autoencoder`; they are
            keys of their own in JSON.
        validation_loss: of the fit; None where nothing was fitted.
        seconds: of `fit`, `sample` and `measure`, interrupted runs and all candidates included.
        peak_memory_gb: largest resident size of the main process, GB.
        processes: how many shared the sampling.
        device: type of the device that sampled, such as `cpu`.
        threads: of torch, in each process that sampled.
        kernels: which kernels quantized while sampling.
        engine: `fake` (simulated quantization) or `integer`, and which layers ran so, or why not.
        environment: commit, machine, versions; of the measuring.
        config: the configuration, without what only concerns the machine.
        metrics: of the images, by name: `fid`, `isc_mean`, `kid_mean`, `precision`, ...
        features: `name` and content hash (`weights`) of the feature network.
        feature_engine: what computed the features: `torch`, or ONNX Runtime's version. Rows that
            were made before there was a choice lack it; theirs was torch.
        reference: `content`, number of `images` and `protocol` of the training images.
        held_out: the same metrics of real images that no model was trained on, and their number.
        which_weights: of a source that has both, `unet_ema/` or `unet/`, `EMA` or `raw`; None where
            there is one set, and then not a key in JSON.
        few_for: number of features, if FID is of no more images than that; else None, and no key.
        reconstructed: the same, of these images as the model's autoencoder gives them back; None
            where there is no autoencoder, and then not a key in JSON.
        half_sampling: deviation of the Frechet distance over halves of the images, `fid`; older
            rows lack this key and the two below.
        precision_recall: `precision` and `recall`, where they are not among `metrics`.
        paired: distance to the float model's images from the same noise; not of the float model.
        candidates: of `best_of_5`, every checkpoint's update and metrics; else None, and no key.
        sampled_on: environments that sampled, in turn, unless it was that of the measuring alone;
            then None, and no key.
        fitted_on: environment of the fit, likewise.
        compiled: True if the fit trained blocks that torch compiled, with the compiler's rounding;
            else None, and no key.
    """

    name: str
    seed: int
    sample: str
    report: str
    update: int | None
    fingerprints: dict[str, str]
    images: int
    image_set: str
    weights: str
    model_parts: dict[str, str]
    validation_loss: float | None
    seconds: dict[str, float]
    peak_memory_gb: float
    processes: int
    device: str
    threads: int
    kernels: str
    engine: str
    environment: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, float]
    features: dict[str, str]
    feature_engine: str
    reference: dict[str, Any]
    held_out: dict[str, Any]
    which_weights: str | None = None
    few_for: int | None = None
    reconstructed: dict[str, Any] | None = None
    half_sampling: dict[str, float] | None = None
    precision_recall: dict[str, float] | None = None
    paired: dict[str, Any] | None = None
    candidates: list[dict[str, Any]] | None = None
    sampled_on: list[dict[str, Any]] | None = None
    fitted_on: dict[str, Any] | None = None
    compiled: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the row as it is written and read, with its seal."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = values.pop("model_parts")

        # A row has no key for that of which there is nothing to say.
        optional = {f.name for f in dataclasses.fields(self) if f.default is None}
        present = {k: v for k, v in values.items() if v is not None or k not in optional}
        return files.sealed({**present, **parts})


def _kinds() -> dict[str, type[Any]]:
    """Return key -> required type of the values of a row, for those that are read from it."""
    found: dict[str, type[Any]] = {"images": int, "name": str, "sample": str}
    for name, hint in get_type_hints(Row).items():
        members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        origins: list[Any] = [get_origin(member) for member in members]
        if dict in origins or list in origins:
            found[name] = dict if dict in origins else list
    return found


KINDS = _kinds()


def real_metrics(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of real images in a row, by kind."""
    return {kind: row[kind] for kind in REAL if kind in row}


def measure_parts(
    sample: str, features: list[str], data: Mapping[str, str], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the metrics depend on, for their fingerprint.

    Args:
        sample: fingerprint of the sampled set.
        features: name and content hash of the feature network.
        data: what the real images are (see `Data.parts`).
        evaluation: group `eval` of the configuration.
    """
    return {
        "sample": sample,
        "features": features,
        "data": data,
        "metrics": sorted(evaluation["metrics"]),
        "batch": evaluation["batch"],
        "reference_images": evaluation.get("reference_images"),
    }


@dataclass(frozen=True)
class RowRecord:
    """The row of a measure stage, as a record: one of several in a file, one for each features.

    Args:
        file: the JSON file of rows.
        fingerprint: of the measure stage.
    """

    file: Path
    fingerprint: str

    def find(self) -> dict[str, Any] | None:
        """Return the row of this fingerprint, or None."""
        same = [row for row in read_rows(self.file) if self._is_of(row)]
        return same[-1] if same else None

    def require_same(self, features: str, config: Mapping[str, Any]) -> None:
        """Refuse to replace a row of the same features that was measured in another way.

        Args:
            features: name of the feature network.
            config: as a row keeps it, of the measuring now; says what changed.

        Raises:
            AnotherResultError: naming up to four differences, and what to do.
        """
        for row in read_rows(self.file):
            if row["features"]["name"] != features or self._is_of(row):
                continue

            then, now = records.upgrade(row["config"]), as_recorded(config)
            changed = [
                change
                for group in ("eval", "data")
                for change in differences(then.get(group), now.get(group), group)
            ]
            what = listed(changed) or "other images, or other weights of the features"
            raise AnotherResultError(
                f"{self.file} holds a row of another measurement ({what}): set"
                " sampler.label=NAME to keep both, or move it away"
            )

    def _is_of(self, row: Mapping[str, Any]) -> bool:
        return bool(row.get("fingerprints", {}).get("measure") == self.fingerprint)

    def write(self, row: dict[str, Any]) -> None:
        """Add the row, in place of an older one of the same features."""
        write_row(self.file, row)


def read_rows(file: Path, must_be_sealed: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a file, with their whole configurations; none if there is no file.

    Args:
        file: of the rows.
        must_be_sealed: refuse rows without a seal, which an earlier version may have written.

    Raises:
        ValueError: if the file is damaged, a row does not match its seal, or the record of the fit
            that a row refers to is missing.
    """
    content = files.read_json(file, ["rows"], must_be_sealed)
    rows = content["rows"] if content is not None else []
    if not isinstance(rows, list):
        raise files.damaged(file, "its rows are no list")

    if not all(isinstance(row, dict) and row.keys() >= NEEDED for row in rows):
        raise files.damaged(file, "a row lacks a part")

    rows = [_whole(file, row) for row in rows]
    for row in rows:
        files.require_seal(file, row, must_be_sealed)
        _require_kinds(file, row)
    return rows


def _whole(file: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the groups of its configuration that its file left to the fit's record.

    Raises:
        ValueError: if that record is missing, damaged, or lacks a group.
    """
    if AS_FIT not in row:
        return dict(row)

    config, groups = row["config"], row[AS_FIT]
    named = isinstance(groups, list) and all(isinstance(group, str) for group in groups)
    if not named or not isinstance(config, dict):
        raise files.damaged(file, f"{AS_FIT} of a row is {groups!r:.40}")

    record = _fit_record(file)
    if record is None:
        raise ValueError(
            f"{file}: its rows are of a {FIT_RECORD} that is missing; put it back, or run the"
            " command again, which makes it"
        )
    of_fit = _config_of(record)
    if missing := [group for group in groups if group not in of_fit]:
        raise files.damaged(file, f"{record} has no {', '.join(missing)}")

    rest = {key: value for key, value in row.items() if key != AS_FIT}
    return {**rest, "config": {**{group: of_fit[group] for group in groups}, **config}}


def require_rows_of(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a new record of a fit with which rows that are there could not be read any more.

    Its configuration may differ from the old one's where no result depends on it, as in a path; a
    row that left its groups there has to find them as they were.

    Args:
        folder: of the run, which has no record now.
        config: that the new record will hold.

    Raises:
        ValueError: naming the file of rows, and what to do.
    """
    for file in sorted(folder.rglob("metrics.json")):
        for row in (files.read_json(file, ["rows"]) or {"rows": []})["rows"]:
            groups = row.get(AS_FIT, [])
            whole = {key: value for key, value in row.items() if key != AS_FIT}
            whole["config"] = {**{g: config.get(g) for g in groups}, **row["config"]}
            if groups and files.seal_fault(whole) is not None:
                raise ValueError(
                    f"{file}: its rows refer to the configuration in {FIT_RECORD}, which is"
                    " missing, and this command's differs; put the file back, or move the rows away"
                )


def _short(file: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sealed row without the groups that the fit's record holds alike; see `_whole`."""
    record = _fit_record(file)
    if record is None:
        return dict(row)

    config, of_fit = row["config"], _config_of(record)
    alike = {
        group
        for group, value in config.items()
        if group not in OF_THE_SET and group in of_fit and _same(of_fit[group], value)
    }
    own = {group: value for group, value in config.items() if group not in alike}
    return {**row, "config": own, AS_FIT: sorted(alike)} if alike else dict(row)


def _same(one: Any, other: Any) -> bool:
    """Say whether two values are the same JSON: 1, 1.0 and true are equal, but not the same."""
    return files.json_text(one) == files.json_text(other)


def _fit_record(file: Path) -> Path | None:
    """Return the record of the fit that a file of rows is of; None if there is none above it."""
    above = (folder / FIT_RECORD for folder in file.absolute().parents[:3])  # a checkpoint's too
    return next((record for record in above if record.exists()), None)


def _config_of(record: Path) -> dict[str, Any]:
    """Return the configuration of a fit's record.

    Raises:
        ValueError: if the record is damaged, or was removed meanwhile.
    """
    config = (files.read_json(record, ["config"]) or {}).get("config")
    if not isinstance(config, dict):
        raise files.damaged(record, f"its config is {config!r:.40}")
    return config


def _require_kinds(file: Path, row: Mapping[str, Any]) -> None:
    """Refuse a row with values of other kinds: a seal says that it is whole, not who wrote it.

    Raises:
        ValueError: naming the file and the key.
    """
    for key, kind in KINDS.items():
        value = row.get(key)
        absent = value is None and key not in NEEDED
        if not absent and (not isinstance(value, kind) or isinstance(value, bool)):
            raise files.damaged(file, f"{key} of a row is {value!r:.40}")

    if not isinstance(row["features"].get("name"), str):
        raise files.damaged(file, "features of a row have no name")
    for name, value in row["metrics"].items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise files.damaged(file, f"metrics.{name} of a row is {value!r:.40}")


def write_row(file: Path, row: dict[str, Any]) -> None:
    """Add a row to its file, in place of an older one of the same features."""
    features = row["features"]["name"]
    others = [r for r in read_rows(file) if r["features"]["name"] != features]
    write_rows(file, [*others, files.sealed(row)])


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write sealed rows in place of those of a file, in the order of their features."""
    in_order = sorted(rows, key=lambda row: row["features"]["name"])
    files.write_json(file, {"rows": [_short(file, row) for row in in_order]})
