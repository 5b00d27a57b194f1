"""Inject faults into everything that runs write, try wrong and hostile inputs, and count outcomes.

make faults          at most 15 minutes on two cores; writes results/analysis/faults.{json,md}

1. Damage: tiny runs are made, finished and killed half-way. Every file of theirs, and every file
   that their command names, is damaged in the ways of `FAULTS`, one at a time on a copy, and the
   same command is run again.

   A training and a block reconstruction on pixels and a training on latents get all faults. The
   other subjects have choices of their own, several in one run: classes, integers and the best of
   several checkpoints; an imported calibration set, AdaRound and PTQD's correction; an autoencoder
   and a float latent network, which give no row. Their readers are those of the first three, so
   that they get the faults of `FEW`, and only files of kinds that the first three have not.
2. Kills: SIGKILL at a file operation, then the same command again.
3. Inputs: all entries of tests/faults/wrong_inputs.py and tests/faults/hostile.py.

Every case ends with the same bits or in one clear line with a code other than 0. What ends in
another way is listed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig

from tdq_exp.commands import cli
from tdq_exp.config.compose import compose
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline, record_checks
from tdq_exp.quant import calibrate
from tdq_exp.runtime import environment, files, tensor_files
from tdq_exp.runtime.hashes import images_hash, tensor_hash
from tdq_exp.runtime.progress import console

ROOT = Path(__file__).resolve().parents[1]
REPORT = Path("results/analysis/faults")
HASHED = 16  # letters; a longer name holds a hash
WORKERS = 2  # processes
SECONDS = 120  # whatever takes longer hangs

SAME = "same bits"
REMADE = "made again, same bits"
REFUSED = "one line, code not 0"
NAMED = "not read; `verify` names it"
OTHER = "OTHER"
OUTCOMES = (SAME, REMADE, REFUSED, NAMED, OTHER)

QUICK = [
    "tracker=none",
    "launcher=cpu",
    "launcher.threads=1",
    "protocol.qat.calibration_samples=64",
]


class Subject(NamedTuple):
    """A run that is damaged.

    Args:
        name: for the table.
        choices: its command line, without the folders.
        folder: of its results and caches; every case begins with a copy of another one there.
        inputs: files of a user that its command names.
        files: patterns of the files that are damaged.
        faults: names of what is done to them.
        places: numbers of file operations at which it is killed; it is half done after the middle
            one.
    """

    name: str
    choices: list[str]
    folder: Path
    inputs: tuple[Path, ...] = ()
    files: tuple[str, ...] = ("*",)
    faults: tuple[str, ...] = ()
    places: tuple[int, ...] = tuple(range(1, 30, 3))

    def job(self, *more: str) -> jobs.Experiment:
        """Return the experiment, new for every command as it would be in a process of its own."""
        places = [f"out={self.folder}", f"data.cache={self.folder / 'cache'}"]
        return jobs.build(composed((*self.choices, *QUICK, *places, *more)).copy())


@lru_cache
def composed(arguments: tuple[str, ...]) -> DictConfig:
    """Return one composition for all cases of a command line: it takes longer than a finished run."""
    return compose(list(arguments))


class Ending(NamedTuple):
    """How a command ended: its code, all that it printed, and a traceback or nothing."""

    code: int
    printed: str
    trace: str = ""


class Call:
    """A pickle that makes a folder if it is executed."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sign),)


# Faults: (file, the same file of another run or None, sign of execution) -> was anything changed?


def flip(file: Path, other: Path | None, sign: Path) -> bool:
    """Flip one bit in the middle."""
    content = bytearray(file.read_bytes())
    if not content:
        return False
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    return True


def flip_late(file: Path, other: Path | None, sign: Path) -> bool:
    """Flip one bit near the end."""
    content = bytearray(file.read_bytes())
    if not content:
        return False
    content[-1 - len(content) // 10] ^= 1
    file.write_bytes(content)
    return True


def cut(file: Path, other: Path | None, sign: Path) -> bool:
    """Keep the first half only."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return bool(content)


def empty(file: Path, other: Path | None, sign: Path) -> bool:
    """Keep nothing of it."""
    had_content = file.stat().st_size > 0
    file.write_bytes(b"")
    return had_content


def delete(file: Path, other: Path | None, sign: Path) -> bool:
    """Remove it."""
    file.unlink()
    return True


def no_object(file: Path, other: Path | None, sign: Path) -> bool:
    """Write an empty JSON object in its place."""
    file.write_text("{}")
    return True


def no_list(file: Path, other: Path | None, sign: Path) -> bool:
    """Write an empty JSON list in its place."""
    file.write_text("[]")
    return True


def foreign(file: Path, other: Path | None, sign: Path) -> bool:
    """Put the file of the same name of a run with another seed in its place.

    Where names are hashes, another one's file of the same kind takes its place.
    """
    if other is None or not other.is_file() or other.read_bytes() == file.read_bytes():
        return False
    shutil.copyfile(other, file)
    return True


def foreign_folder(file: Path, other: Path | None, sign: Path) -> bool:
    """Put all files of the same folder of another run in the place of this one's."""
    if file.name != "groups.npy" or other is None or not other.is_file():
        return False
    for beside in other.parent.iterdir():
        shutil.copyfile(beside, file.with_name(beside.name))
    return True


def pipe(file: Path, other: Path | None, sign: Path) -> bool:
    """Put a pipe in its place that nobody writes to."""
    file.unlink()
    os.mkfifo(file)
    return True


def executable(file: Path, other: Path | None, sign: Path) -> bool:
    """Put a pickle in its place that makes a folder if it is executed."""
    if file.suffix not in (".pt", ".npy", ".safetensors"):
        return False
    file.write_bytes(pickle.dumps(Call(sign)))
    return True


FAULTS: dict[str, Callable[[Path, Path | None, Path], bool]] = {
    "bit flipped": flip,
    "late bit flipped": flip_late,
    "cut short": cut,
    "emptied": empty,
    "deleted": delete,
    "`{}`": no_object,
    "`[]`": no_list,
    "another run's": foreign,
    "another run's folder": foreign_folder,
    "a pipe": pipe,
    "a pickle": executable,
}

FEW = ("bit flipped", "cut short", "deleted", "`{}`", "another run's", "a pickle")


# Commands


@contextmanager
def alarmed() -> Iterator[None]:
    """Raise `TimeoutError` in what hangs."""

    def stop(*_: object) -> None:
        raise RuntimeError(f"no end within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(build: Callable[[], jobs.Experiment]) -> Ending:
    """Build and run a job as the command does, and return how it ended."""

    def command() -> None:
        pipeline.run(build())

    printed = io.StringIO()
    try:
        with alarmed(), redirect_stdout(printed), redirect_stderr(printed):
            code = cli.attempt(command).code
    except Exception:
        return Ending(1, printed.getvalue(), traceback.format_exc(limit=-3))
    return Ending(code, printed.getvalue())


def products(job: jobs.Experiment) -> dict[str, Any]:
    """Return what a run is for, as it can be compared: network, images, numbers of the row."""
    found: dict[str, Any] = {}
    for name in ("baked.safetensors", "weights.safetensors"):
        if (job.folder / name).is_file():
            found["network"] = tensor_hash(tensor_files.read_tensors(job.folder / name).tensors)

    for images in sorted(job.folder.rglob("images.npy")):
        if images.is_file():
            found[str(images.relative_to(job.folder))] = images_hash(np.load(images))
    for file in sorted(job.folder.rglob("metrics.json")):
        if file.is_file():
            row = files.read_json(file) or {}
            rows = row.get("rows", [row])
            found[str(file.relative_to(job.folder))] = [
                {key: r.get(key) for key in ("metrics", "image_set", "fingerprints")} for r in rows
            ]
    return found


def killed_at(job: jobs.Experiment, count: int) -> bool:
    """Run a job in a process that kills itself at its n-th replaced file.

    Returns:
        Whether it was killed; a run with fewer operations ends by itself.
    """
    child = os.fork()
    if child == 0:
        replace, left = os.replace, count

        def replace_or_die(*arguments: Any, **options: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*arguments, **options)

        os.replace = replace_or_die  # type: ignore[assignment]
        run(lambda: job)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def put(source: Path, target: Path) -> None:
    """Make a folder a copy of another one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


# Outcomes


def outcome(
    subject: Subject, job: jobs.Experiment, file: Path, wanted: dict[str, Any], sign: Path
) -> tuple[str, str]:
    """Run a damaged run's command again, and return the kind of ending with an explanation.

    Args:
        subject: the run.
        job: it, as it was built before the damage.
        file: that was damaged.
        wanted: products of the whole run.
        sign: is there if anything was executed.
    """
    before = state_of(file)
    ending = run(subject.job)

    # 1. What must not happen at all.
    if sign.exists():
        sign.rmdir()
        return OTHER, "executed"
    if ending.trace:
        return OTHER, ending.trace.strip().splitlines()[-1]

    # 2. A refusal is one line.
    if ending.code:
        errors = [line for line in ending.printed.splitlines() if line.startswith("error: ")]
        clear = len(errors) == 1 or "error: " in ending.printed
        return (REFUSED if clear else OTHER), ending.printed.strip()[-200:]

    # 3. The same products, and no damage that nobody speaks of.
    try:
        found = products(job)
    except (ValueError, OSError) as error:
        return OTHER, f"silence with a damaged product: {error}"
    changed = [key for key in wanted if key in found and found[key] != wanted[key]]
    if changed:
        return OTHER, f"other bits: {changed}"
    if state_of(file) != before and file not in subject.inputs:
        return REMADE, ""

    # What is not there, or is not read again, does no harm.
    if before is None or file in subject.inputs:
        return SAME, ""
    if [line for line in faults_of(job, file) if file.name in line]:
        return NAMED, ""
    if subject.folder / "cache" in file.parents:
        return outcome_when_read(subject, file, wanted)
    return OTHER, "silence, and `verify` does not name it"


def outcome_when_read(subject: Subject, file: Path, wanted: dict[str, Any]) -> tuple[str, str]:
    """Return how the next run ends that reads a damaged cache, which a finished one does not."""
    before = state_of(file)
    job = subject.job("label=again")
    ending = run(lambda: job)

    if ending.trace:
        return OTHER, ending.trace.strip().splitlines()[-1]
    if ending.code:
        clear = "error: " in ending.printed
        return (REFUSED if clear else OTHER), ending.printed.strip()[-200:]

    if products(job)["network"] != wanted["network"]:
        return OTHER, "other bits in the next run"
    if state_of(file) != before:
        return REMADE, ""
    return OTHER, "the next run takes it without a word"


def state_of(file: Path) -> object:
    """Return what tells whether a file was made again: its inode and time, or None."""
    if not file.exists():
        return None
    about = file.stat()
    return about.st_ino, about.st_mtime_ns, about.st_size


def faults_of(job: jobs.Experiment, file: Path) -> list[str]:
    """Return what `verify` says of the run, or of the cache that holds a file."""
    with alarmed():
        if job.folder in file.parents:
            return record_checks.run_faults(job.folder)
        return record_checks.faults_of(job.data.cache)


# The three parts


class Counts:
    """Counts of outcomes, and what ended in another way than it should.

    Args of `add`: part, row of the table, outcome, explanation.
    """

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, Counter[str]]] = {}
        self.others: list[str] = []

    def add(self, part: str, row: str, ending: str, why: str = "") -> None:
        """Count one case."""
        self.tables.setdefault(part, {}).setdefault(row, Counter())[ending] += 1
        if ending == OTHER:
            self.others.append(f"{part}, {row}: {why}")
            print(f"OTHER  {part}, {row}: {why}", flush=True)

    def take(self, more: Counts) -> None:
        """Add the counts of another process."""
        for part, rows in more.tables.items():
            for row, count in rows.items():
                self.tables.setdefault(part, {}).setdefault(row, Counter()).update(count)
        self.others += more.others


def damage(
    subject: Subject, start: Path, other: Path, wanted: dict[str, Any], counts: Counts, state: str
) -> None:
    """Damage every file of a run in every way, one at a time on a copy.

    Args:
        subject: the run.
        start: what each case begins with: results and caches, whole or half done.
        other: the same of a run with another seed.
        wanted: products of the whole run.
        counts: of outcomes.
        state: of the run, for the table.
    """
    sign, job = subject.folder.parent / "executed", subject.job()
    paths = [path for path in kinds_of_files(start) if any(map(path.match, subject.files))]
    for path in paths:
        for name in subject.faults or FAULTS:
            put(start, subject.folder)
            file = subject.folder / path
            if FAULTS[name](file, twin(file, path, other), sign):
                ending, why = outcome(subject, job, file, wanted, sign)
                where = f"{subject.name}, {state}, {path}: {why}"
                counts.add("Damaged files", name, ending, where)

    # A user's files, which are put back after each case.
    for file in subject.inputs:
        content = file.read_bytes()
        for name in subject.faults or FAULTS:
            put(start, subject.folder)
            changed = FAULTS[name](file, file.with_name(f"other-{file.name}"), sign)
            if changed:
                ending, why = outcome(subject, job, file, wanted, sign)
                where = f"{subject.name}, {state}, {file.name}: {why}"
                counts.add("A user's files", name, ending, where)
            file.unlink(missing_ok=True)
            file.write_bytes(content)


def twin(file: Path, path: Path, other: Path) -> Path | None:
    """Return the file of another run that takes a file's place, or None.

    Args:
        file: to be damaged.
        path: of it, relative to the folder of results and caches.
        other: the same folder of a run with another seed.
    """
    same = other / str(path).replace("seed0", "seed1")
    cache = [] if "cache" not in path.parts else sorted(same.parent.glob(f"*{path.suffix}"))
    beside = sorted(same.parent.parent.glob(f"*/{path.name}")) if cache else []
    content = file.read_bytes()

    for found in (same, *cache, *beside):
        like = len(found.stem) > HASHED or found.name == file.name
        if found.is_file() and like and found.read_bytes() != content:
            return found
    return None


def kinds_of_files(folder: Path) -> list[Path]:
    """Return one file of each kind below a folder, relative to it."""
    kinds: dict[tuple[str, str], Path] = {}
    for file in sorted(folder.rglob("*")):
        ours = "wandb" not in file.parts and not file.name.startswith(".")
        if file.is_file() and ours:
            name = "".join("#" if c.isdigit() else c for c in file.name)
            if len(file.stem) > HASHED:
                name = file.suffix
            kinds.setdefault((file.parent.name, name), file.relative_to(folder))
    return list(kinds.values())


def kills(
    subject: Subject,
    wanted: dict[str, Any],
    counts: Counts,
    keep: dict[int, Path],
) -> None:
    """Kill a run at the given file operations, and run the command again.

    Args:
        subject: the run.
        wanted: products of the whole run.
        counts: of outcomes.
        keep: number of an operation -> where a copy of the half-done run is left.
    """
    for place in subject.places:
        shutil.rmtree(subject.folder, ignore_errors=True)
        if not killed_at(subject.job(), place):
            break
        if place in keep:
            put(subject.folder, keep[place])

        job = subject.job()
        ending = run(subject.job)
        same = ending.code == 0 and products(job) == wanted
        left = list(subject.folder.rglob(".*.part"))
        why = ending.trace or ending.printed[-200:] or f"other bits, or part files: {left}"
        row = f"{subject.name}, at a replaced file"
        counts.add("Kills", row, SAME if same and not left else OTHER, f"{place}: {why}")


def inputs() -> Counts:
    """Try every wrong input and hostile file, as the tests do, and return them by outcome."""
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "tests/faults", "-q", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=ROOT,
            env={**os.environ, "TDQ_FAULTS": "all"},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            # Entries of the lists; the other tests there are not about one input.
            if "[" not in case.get("name", "") or case.find("skipped") is not None:
                continue
            failed = (
                case.find("failure") if case.find("failure") is not None else case.find("error")
            )
            hostile = "hostile" in case.get("classname", "")
            row = "hostile files" if hostile else "wrong inputs"
            if failed is None:
                counts.add("Inputs", row, REFUSED)
            else:
                counts.add("Inputs", row, OTHER, f"{case.get('name')}: {failed.get('message')}")
    return counts


def subjects(place: Path) -> list[Subject]:
    """Return the runs, after training the float networks that they begin with."""
    # 1. Float networks, each with another one that takes its place.
    classes = "+model.definition.network.num_class_embeds=10"
    pixels = trained(place, "tiny", ["model=tiny"])
    conditional = trained(place, "classes", ["model=tiny", classes])

    latents = ["model=tiny_latent"]
    autoencoder = trained(place, "autoencoder", latents, "fit=pretrain_autoencoder")
    latents = [*latents, f"model.autoencoder={autoencoder}"]
    latent = trained(place, "latent", latents)

    # 2. The calibration set of another project.
    imported = place / "inputs" / "set.pt"
    for number, file in enumerate((imported, imported.with_name("other-set.pt"))):
        random = torch.Generator().manual_seed(number)
        t = torch.randint(0, 1000, (24,), generator=random)
        torch.save((torch.randn(24, 1, 8, 8, generator=random), t), file)

    # 3. The runs.
    made = {
        "tiny": ["model=tiny", f"model.weights={pixels}"],
        "latent": [*latents, f"model.weights={latent}"],
        "classes": ["model=tiny", classes, f"model.weights={conditional}"],
    }
    ptq = ["method=ptq4dm", "calibration=uniform"]
    learned = ["fit.rounding=adaround", "fit.rounding_updates=3", "fit.correction=ptqd"]
    learned += [f"calibration.path={imported}"]
    best = ["fit.report=best_of_5", "sampler.engine=integer", "sampler.min_speedup=0"]
    pretrain = ["method=fp", "fit=pretrain"]

    some: dict[str, Any] = {"faults": FEW, "places": (2, 7, 12)}
    of_best = ("best-*", "update*/*.json", "update*/*.png", "engine.json", "state*.pt", "images/*")
    of_learned = ("blocks/*", "calibration_sets/*/*", "baked.safetensors", "over_time.pt")
    of_latents = ("latents/*/*", "weights.safetensors", "state*.pt", "fit.json", "grid.png")

    qat, reconstructed = place / "qat" / "work", place / "ptq" / "work"
    return [
        Subject("trained, pixels", made["tiny"], qat, (pixels,)),
        Subject("block reconstruction, pixels", [*made["tiny"], *ptq], reconstructed),
        Subject("trained, latents", made["latent"], place / "l" / "work", (latent, autoencoder)),
        Subject(
            "classes, integers, best of five",
            [*made["classes"], *best],
            place / "best" / "work",
            files=of_best,
            **some,
        ),
        Subject(
            "imported set, AdaRound, PTQD",
            [*made["tiny"], "method=ptq4dm", *learned],
            place / "learned" / "work",
            (imported,),
            files=of_learned,
            **some,
        ),
        Subject(
            "autoencoder",
            ["model=tiny_latent", "method=fp", "fit=pretrain_autoencoder"],
            place / "encoder" / "work",
            files=of_latents,
            **some,
        ),
        Subject(
            "float, latents",
            [*latents, *pretrain],
            place / "float" / "work",
            (autoencoder,),
            files=of_latents,
            **some,
        ),
    ]


def trained(place: Path, name: str, choices: list[str], fit: str = "fit=pretrain") -> Path:
    """Train a float network with two seeds; return the file of the first.

    The other one lies beside it as `other-<name>.safetensors`.
    """
    target = place / "inputs" / f"{name}.safetensors"
    target.parent.mkdir(exist_ok=True)

    for seed, file in enumerate((target, target.with_name(f"other-{target.name}"))):
        subject = Subject(name, [*choices, "method=fp", fit], place / name)
        pipeline.run(job := subject.job(f"seed={seed}"))
        shutil.copyfile(job.folder / "weights.safetensors", file)
    return target


def main() -> int:
    """Run all parts, print and write the counts, and return 1 if anything ended otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first run only, a few kills")
    parser.add_argument("--only", metavar="NAME", help="one subject")
    parser.add_argument("--out", type=Path, default=REPORT, help="of the page, without a suffix")
    options = parser.parse_args()

    torch.set_num_threads(1)
    calibrate.KEPT = 512  # the search for start values takes longer than fitting a tiny net
    console.quiet = True
    counts = Counts()

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        chosen = subjects(Path(folder))
        if options.quick:
            chosen = [chosen[0]._replace(places=(1, 10, 19), inputs=())]
        if options.only is not None:
            chosen = [subject for subject in chosen if subject.name == options.only]
        console.quiet = False
        with ProcessPoolExecutor(WORKERS, get_context("fork")) as workers:
            tasks: list[Future[Counts]] = [workers.submit(of_run, subject) for subject in chosen]
            for task in [*tasks, *([] if options.only else [workers.submit(inputs)])]:
                counts.take(task.result())

    write(options.out, counts)
    print(options.out.with_suffix(".md").read_text())
    return 1 if counts.others else 0


def of_run(subject: Subject) -> Counts:
    """Do everything with one run, finished, killed, and half done, and return the counts."""
    counts = Counts()
    whole, half = subject.folder.parent / "whole", subject.folder.parent / "half"
    job = subject.job()
    pipeline.run(job)
    wanted = products(job)
    put(subject.folder, whole)

    # The same run with another seed, whose files are put in the place of this one's.
    other = subject.folder.parent / "other"
    shutil.rmtree(subject.folder)
    more = ["calibration.seed=1"] if "calibration=uniform" in subject.choices else []
    pipeline.run(subject.job("seed=1", *more))
    put(subject.folder, other)

    damage(subject, whole, other, wanted, counts, "finished")
    kills(subject, wanted, counts, {subject.places[len(subject.places) // 2]: half})
    if half.exists():
        damage(subject, half, other, wanted, counts, "half done")
    return counts


def write(target: Path, counts: Counts) -> None:
    """Write the counts as a sealed JSON file and as a page."""
    about = environment.environment()
    files.write_json(
        target.with_suffix(".json"),
        {
            "counts": counts.tables,
            "others": counts.others,
            "commit": about["commit"],
            "machine": about["machine"],
        },
    )

    lines = ["# Faults by outcome", ""]
    lines += ["`make faults` damages, kills and misuses tiny runs; see `scripts/faults.py`.", ""]
    for part, rows in counts.tables.items():
        lines += [f"## {part}", "", "| " + " | ".join(("", *OUTCOMES)) + " |"]
        lines += ["|" + "---|" * (1 + len(OUTCOMES))]
        lines += [
            f"| {row} | " + " | ".join(str(count[kind]) for kind in OUTCOMES) + " |"
            for row, count in rows.items()
        ]
        lines += [""]
    lines += [f"- {line}" for line in counts.others]
    lines += [f"Commit {about['commit']}; {about['machine']}."]
    files.write_text(target.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
