"""Checks of what lies in a results folder: checksums, seals, and what belongs together.

    fit.json      its fingerprint is that of its parts
    samples.json  the same, and its fit is the one beside it
    metrics.json  every row is of this fit and this set, with the counts and engine that they state
    images        every group matches its checksum, and the set the hash in its row
    networks      match their checksums, and belong to this fit; and so do training states
    layers.json, engine.json, pictures
                  are of this fit, or of the set beside them
    *.onnx        match their checksums

Files that may have been removed, such as the images and networks of published runs, are no fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tdq_exp.config.naming import FIT_RECORD
from tdq_exp.data.arrays import ImageStore, open_array
from tdq_exp.deploy.onnx import graph
from tdq_exp.experiment.engines import ENGINE
from tdq_exp.experiment.row import measure_parts, read_rows
from tdq_exp.experiment.stored_network import read_fit, require_update
from tdq_exp.runtime import environment, figures, files, tensor_files
from tdq_exp.runtime.hashes import images_hash, tensor_hash
from tdq_exp.runtime.stage import read_record

NETWORKS = ("baked.safetensors", "weights.safetensors")
UNCHECKED = "has no checksum; an earlier version wrote none: python scripts/migrate_records.py"
CHECKED = {".json", ".png", ".svg", ".pt", ".safetensors", ".onnx", ".part"}
OTHERS = {"wandb", "png"}  # not ours, or nothing is read from them
BESIDE = ("held_out", "reconstructed", "half_sampling", "precision_recall")  # numbers of a row
HISTORY = ".history.json"  # how weights beside it were made

T = TypeVar("T")


def faults_of(path: Path) -> list[str]:
    """Return everything that is wrong with a run, a folder of runs, or one file, a line each.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is one file of a kind that nothing can be said of.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        if path.suffix not in CHECKED:
            raise ValueError(
                f"{path}: such a file has no checksum of its own; name the run that it belongs to"
            )
        return _file_faults(path)

    if not any(path.rglob("*")):
        raise ValueError(f"{path}: is empty, nothing was checked")

    # 1. Runs; then whatever lies beside them, such as shipped networks.
    runs = sorted(record.parent for record in path.rglob(FIT_RECORD))
    found = [fault for run in runs for fault in run_faults(run)]

    inside = set(runs)
    for file in _files(path):
        if not inside.intersection(file.parents):
            found += _file_faults(file, must_be_sealed=False)

    # 2. Rows without the record of a fit.
    orphans = [f for f in path.rglob("metrics.json") if not inside.intersection(f.parents)]
    found += [f"{file}: rows without a {FIT_RECORD}" for file in orphans]
    return found + commit_faults(path)


def run_faults(run: Path, everything: bool = True) -> list[str]:
    """Return what is wrong with the files of a run.

    Args:
        run: its folder.
        everything: also read images and training states, which a finished run needs no more.
    """
    try:
        return _run_faults(run, everything)
    except (LookupError, TypeError, AttributeError) as error:  # sealed by a stranger
        return [f"{run}: its records hold what no run writes ({type(error).__name__}: {error})"]


def _run_faults(run: Path, everything: bool) -> list[str]:
    found: list[str] = []
    record = _tried(found, lambda: read_fit(run, must_be_sealed=True))

    # 1. Sampled sets and their rows.
    folders = {f.parent for name in ("samples.json", "metrics.json") for f in run.rglob(name)}
    for folder in sorted(folders):
        found += _set_faults(folder, record, everything)

    # 2. Every other file by itself, and networks as this fit's.
    special = {FIT_RECORD, "samples.json", "metrics.json"}
    for file in _files(run):
        state = file.suffix == ".pt"
        if file.name not in special and (everything or not state):
            found += _file_faults(file, record)
    return found


def row_faults(file: Path) -> list[str]:
    """Return what is wrong with the rows of a file, as far as small files tell.

    Records that are not beside it are not missed.
    """
    found: list[str] = []
    rows = _tried(found, lambda: read_rows(file, must_be_sealed=True)) or []
    run = next((folder for folder in file.parents if (folder / FIT_RECORD).exists()), None)
    fit = _tried(found, lambda: read_fit(run)) if run is not None else None

    for row in rows:
        places = [file.parent, file.parent / f"update{row.get('update')}"]
        samples_file = next(
            (p / "samples.json" for p in places if (p / "samples.json").exists()), None
        )
        samples = _tried(found, partial(read_record, samples_file)) if samples_file else None
        found += [f"{file}: {fault}" for fault in _row_faults(row, fit, samples)]
        folders = {place.name for place in (file.parent, file.parent.parent)}
        if "sample" in row and row["sample"] not in folders:
            found.append(f"{file}: a row is of the set {row['sample']}, in another one's folder")
    return found


def commit_faults(path: Path) -> list[str]:
    """Return a line for each row or fit below a folder whose commit the history does not hold."""
    named: dict[str, Path] = {}
    quiet: list[str] = []

    for file in sorted(path.rglob("metrics.json")):
        for row in _tried(quiet, partial(read_rows, file)) or []:
            named.setdefault(str(row.get("environment", {}).get("commit")), file)
    for file in sorted(path.rglob(FIT_RECORD)):
        fit = _tried(quiet, partial(read_fit, file.parent)) or {}
        facts = fit.get("facts", {})
        named.setdefault(str(facts.get("environment", {}).get("commit")), file)

    named.pop("None", None)  # computed outside of a checkout
    unknown = set(environment.unknown_commits(list(named)))
    return [
        f"{file}: names the commit {name}, which the history does not hold"
        for name, file in named.items()
        if name.removesuffix("+") in unknown
    ]


def _row_faults(
    row: Mapping[str, Any], fit: Mapping[str, Any] | None, samples: Mapping[str, Any] | None
) -> Iterable[str]:
    """Yield what a row and the records beside it do not agree on."""
    stated = row.get("fingerprints", {})
    candidates = [found.get("metrics") for found in row.get("candidates") or []]
    groups = [*(row.get(group) for group in ("metrics", *BESIDE)), *candidates]
    numbers = [v for group in groups if group for v in group.values() if isinstance(v, int | float)]
    if not all(math.isfinite(number) for number in numbers):
        yield "a metric is not a number"

    # The fit, and what a row cites of it.
    if fit is not None:
        if stated.get("fit") != fit["fingerprint"]:
            yield f"a row is of the fit {stated.get('fit')}, beside it is {fit['fingerprint']}"
        if row.get("name") != fit.get("name"):
            yield f"a row is of the run {row.get('name')}, beside it is {fit.get('name')}"
        weights = fit.get("facts", {}).get("weights")
        if row.get("weights") != weights:
            yield f"a row is of the weights {row.get('weights')}, the fit is of {weights}"

    # The set.
    if samples is not None:
        if stated.get("sample") != samples["fingerprint"]:
            beside = samples["fingerprint"]
            yield f"a row is of the set {stated.get('sample')}, beside it is {beside}"
        asked = samples["parts"].get("sampler", {}).get("images")
        if row["images"] != asked:
            yield f"a row is of {row['images']} images, its set has {asked}"
        engine = samples.get("engine", row.get("engine"))
        if row.get("engine") != engine:
            yield f"a row is of the engine {row.get('engine')}, its set of {engine}"

    # The measurement, where the fit says what the data are.
    data = fit["parts"].get("data") if fit is not None else None
    if data and data["train"] == row["reference"]["content"]:
        features = [row["features"]["name"], row["features"]["weights"]]
        parts = measure_parts(str(stated.get("sample")), features, data, row["config"]["eval"])
        if files.fingerprint(parts) != stated.get("measure"):
            yield "a row's measurement has another fingerprint than its parts give"


def _set_faults(folder: Path, fit: Mapping[str, Any] | None, everything: bool) -> list[str]:
    """Return what is wrong with a sampled set, its record and its rows."""
    found: list[str] = []
    file = folder / "samples.json"
    samples = _tried(found, lambda: read_record(file, must_be_sealed=True))

    if (
        samples is not None
        and fit is not None
        and samples["parts"].get("fit") != fit["fingerprint"]
    ):
        found.append(f"{file}: is of another fit than the one beside it")
    if samples is None and not found and not list(folder.glob("update*/samples.json")):
        found.append(f"{file}: is missing, and there are rows of it")
    if (folder / "metrics.json").exists():
        found += row_faults(folder / "metrics.json")

    # The images: by group, and as what was measured.
    if samples is None or not everything or not (folder / "images").exists():
        return found
    return found + _image_faults(folder, samples)


def _image_faults(folder: Path, samples: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    pixels = _tried(found, lambda: open_array(folder / "images" / "images.npy"))
    if pixels is None or pixels.ndim != 4:
        return found or [f"{folder / 'images'}: damaged (no set of images)"]

    height, width, channels = pixels.shape[1:]
    of, sampler = samples["fingerprint"], samples["parts"]["sampler"]
    shape = (height, width, channels)
    store = ImageStore(folder / "images", sampler["images"], sampler["batch"], shape, of)
    found += store.faults()
    if found:
        return found

    measured = {
        row.get("image_set") for row in _tried([], lambda: read_rows(folder / "metrics.json")) or []
    }
    if any(stated not in (None, images_hash(pixels)) for stated in measured):
        found.append(f"{folder / 'images'}: are not the images that were measured")
    return found


def _file_faults(
    file: Path, fit: Mapping[str, Any] | None = None, must_be_sealed: bool = True
) -> list[str]:
    """Return what is wrong with one file.

    Args:
        file: of any kind.
        fit: record of the fit that it should belong to.
        must_be_sealed: whether a file without a checksum is a fault.
    """
    found: list[str] = []

    if file.name.startswith(".") and file.suffix == ".part":
        return [f"{file}: left by a killed run; the run's command removes it"]
    if not file.is_file():
        return [f"{file}: is a pipe, a socket or a device; remove it"]

    if file.suffix == ".json":
        sealed = must_be_sealed and file.name != "wandb-id.json"  # an earlier version sealed none
        content = _tried(found, lambda: files.read_json(file, must_be_sealed=sealed))
        found += _other_owner(file, content, fit)
    elif file.suffix in (".png", ".svg"):
        if not figures.is_whole(file):
            found.append(f"{file}: damaged (no whole picture); remove it")
        elif fit is not None:
            found += _picture_faults(file, fit)
    elif file.suffix == ".onnx" and graph.is_whole(file) is False:
        found.append(f"{file}: damaged (its content does not match its checksum); export it again")
    elif file.suffix == ".pt":
        checked = _tried(found, lambda: tensor_files.check_state(file))
        if must_be_sealed and checked is False:
            found.append(f"{file}: {UNCHECKED}")
        if checked and fit is not None:
            found += _state_faults(file, fit)
    elif file.suffix == ".safetensors":
        found += _tensor_faults(file, fit, must_be_sealed)
    return found


def _other_owner(
    file: Path, content: Mapping[str, Any] | None, fit: Mapping[str, Any] | None
) -> Iterable[str]:
    """Yield a line if a JSON file says that it is of another fit, set or run."""
    if content is None:
        return

    # What is of a fit, of a set, and of a run by its name.
    if fit is not None and file.name == "layers.json":
        stated, wanted = content.get("fit"), fit["fingerprint"]
        if stated not in (None, wanted):
            yield f"{file}: is of the fit {stated}, beside it is {wanted}; remove it"

    if file.name == ENGINE:
        stated, wanted = content.get("sample"), _set_beside(file)
        if stated and wanted and stated != wanted:
            yield f"{file}: is of the set {stated}, beside it is {wanted}"

    if fit is not None and file.name == "wandb-id.json":
        stated, wanted = content.get("name"), fit.get("name")
        if stated is not None and stated.rpartition("/")[0] != wanted:
            yield f"{file}: is of the run {stated}, beside it is {wanted}; remove it"

    # Exported weights: their history is theirs.
    weights = file.with_name(file.name.removesuffix(HISTORY) + ".safetensors")
    if file.name.endswith(HISTORY) and weights.exists():
        found = _tried([], lambda: tensor_files.read_tensors(weights))
        of = found.metadata.get("fit") if found is not None else None
        if of not in (None, content.get("fingerprint")):
            yield f"{file}: is of the fit {content.get('fingerprint')}, {weights.name} of {of}"


def _set_beside(file: Path) -> str | None:
    """Return the fingerprint of the set that a file lies beside, or None."""
    record = _tried([], lambda: read_record(file.parent / "samples.json"))
    return record["fingerprint"] if record is not None else None


def _picture_faults(file: Path, fit: Mapping[str, Any]) -> Iterable[str]:
    """Yield a line if a picture says that it is of another fit or set."""
    wanted = _set_beside(file) or fit["fingerprint"]
    stated = figures.signature(file)
    if stated is not None and stated.partition("_")[0] != wanted:  # a set, then its measurement
        yield f"{file}: is of {stated}, beside it is {wanted}; remove it, it is drawn again"


def _state_faults(file: Path, fit: Mapping[str, Any]) -> list[str]:
    """Return a line if a training state or a block says that it is of another fit."""
    found: list[str] = []
    state = _tried(found, lambda: tensor_files.read_state(file)) or {}
    stated = state.get("fingerprint", fit["fingerprint"])
    if stated != fit["fingerprint"]:
        found.append(f"{file}: is of the fit {stated}, beside it is {fit['fingerprint']}")
    return found


def _tensor_faults(file: Path, fit: Mapping[str, Any] | None, must_be_sealed: bool) -> list[str]:
    found: list[str] = []
    content = _tried(found, lambda: tensor_files.read_tensors(file))
    if content is None:
        return found

    if must_be_sealed and not content.checked:
        found.append(f"{file}: {UNCHECKED}")
    if fit is not None:
        _tried(found, lambda: tensor_files.require_of(file, content.metadata, fit["fingerprint"]))
        if file.name.startswith("best-"):
            _tried(found, lambda: require_update(file, content.metadata))
        stated = fit.get("facts", {}).get("network")
        if file.name in NETWORKS and stated not in (None, tensor_hash(content.tensors)):
            found.append(f"{file}: is not the network that {FIT_RECORD} states")
    return found


def _files(folder: Path) -> list[Path]:
    """Return the files below a folder that have a checksum of their own."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in CHECKED
        and file.exists()
        and not file.is_dir()
        and not OTHERS.intersection(file.relative_to(folder).parts)
    ]


def _tried(found: list[str], read: Callable[[], T]) -> T | None:
    """Return what can be read; add the error of what can't to the faults."""
    try:
        return read()
    except (ValueError, OSError) as error:
        found.append(str(error))
        return None
