"""A row: what a run found out, and all that somebody needs to know in order to compare it.

Rows are written by the measure stage into `metrics.json` beside the images, and read by tables.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdq_exp.runtime import files

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
        weights: content hash of the float network.
        model_parts: content hashes of other parts of the model, such as `autoencoder`; they are
            keys of their own in JSON.
        validation_loss: of the fit; None where nothing was fitted.
        seconds: of `fit`, `sample` and `measure`, interrupted runs included.
        peak_memory_gb: largest resident size of the main process, GB.
        processes: how many shared the run.
        device: type of the device, such as `cpu`.
        threads: of torch, in each process.
        kernels: which kernels quantized.
        engine: `fake` (simulated quantization) or `integer`, and which layers ran so, or why not.
        environment: commit, machine, versions.
        config: the configuration, without what only concerns the machine.
        metrics: of the images, by name: `fid`, `isc_mean`, `kid_mean`, `precision`, ...
        features: `name` and content hash (`weights`) of the feature network.
        feature_engine: what computed the features: `torch`, or ONNX Runtime's version. Rows that
            were made before there was a choice lack it; theirs was torch.
        reference: `content`, number of `images` and `protocol` of the training images.
        held_out: the same metrics of real images that no model was trained on, and their number.
        reconstructed: the same, of these images as the model's autoencoder gives them back; None
            where there is no autoencoder, and then not a key in JSON.
        candidates: of `best_of_5`, every checkpoint's update and metrics; else None, and no key.
    """

    name: str
    seed: int
    sample: str
    report: str
    update: int | None
    fingerprints: dict[str, str]
    images: int
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
    reconstructed: dict[str, Any] | None = None
    candidates: list[dict[str, Any]] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the row as it is written and read."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = values.pop("model_parts")

        absent = [key for key in ("reconstructed", "candidates") if values[key] is None]
        return {**{key: value for key, value in values.items() if key not in absent}, **parts}


def real_metrics(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of real images in a row, by kind."""
    return {kind: row[kind] for kind in REAL if kind in row}


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
        rows = read_rows(self.file)
        return next((r for r in rows if r["fingerprints"]["measure"] == self.fingerprint), None)

    def write(self, row: dict[str, Any]) -> None:
        """Add the row, in place of an older one of the same features."""
        write_row(self.file, row)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none if there is no file."""
    return (files.read_json(file) or {"rows": []})["rows"]


def write_row(file: Path, row: dict[str, Any]) -> None:
    """Add a row to its file, in place of an older one of the same features."""
    features = row["features"]["name"]
    others = [r for r in read_rows(file) if r["features"]["name"] != features]
    files.write_json(file, {"rows": sorted([*others, row], key=lambda r: r["features"]["name"])})
