"""Calibration sets: which steps they take, x with its own t beside it, the same bits in every order, and clear refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from tdq_exp.config.compose import compose
from tdq_exp.data.arrays import GroupedArrays
from tdq_exp.diffusion.ddim import Ddim, time_steps
from tdq_exp.diffusion.draws import Stream, generator, starting_noise
from tdq_exp.experiment import build as jobs
from tdq_exp.fit.ptq import calibration_set
from tdq_exp.fit.ptq.calibration_set import CalibrationSpec, chosen_steps, make_set
from tdq_exp.fit.ptq.stored_set import CalibrationSet, require_parts
from tdq_exp.models.denoiser import Denoiser
from tdq_exp.runtime.processes import Processes
from tests.quant.builders import load_model

T = 1000
FILES = ("x", "t", "image", "x_0", "groups")
NETWORK_KINDS = ("uniform", "ndtc", "ndtc_published")


@pytest.fixture(scope="module")
def processes():
    made = Processes(cpu=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny():
    model = load_model("tiny")
    return model, model.build(seed=3).eval()


@pytest.fixture
def groups_of_4(monkeypatch):
    monkeypatch.setattr(calibration_set, "GROUP", 4)


class SomeImages:
    """Ten images that can be told apart, in place of a data set."""

    random = False

    def __len__(self):
        return 10

    def batch(self, index, flip, noise=None):
        assert not flip.any() and noise is None
        return index.float().reshape(-1, 1, 1, 1) / 10 + torch.linspace(-1, 0, 64).reshape(
            1, 1, 8, 8
        )

    def condition(self, index):
        return None


def made(
    processes,
    tiny,
    cache,
    kind="uniform",
    samples=30,
    images=10,
    steps=6,
    path=None,
    parts=None,
    **options,
):
    """A set of the tiny net, in groups of four trajectories, the last of them padded."""
    model, net = tiny
    spec, sampler = CalibrationSpec(kind, samples, images, **options), Ddim(steps)
    parts = parts or spec.parts({"network": "tiny"}, "abc", dataclasses.asdict(sampler), "digits")
    return make_set(
        spec, Denoiser(net, model), sampler, SomeImages(), parts=parts, cache=cache, processes=processes, path=path
    )  # fmt: skip


def bits(found):
    """All files of a set, byte by byte."""
    return {file.name: file.read_bytes() for file in sorted(found.folder.iterdir())}


def ends(found):
    """x_0 of every trajectory, `[images, C, H, W]`."""
    return torch.from_numpy(np.array(found.arrays.read("x_0")))


def spec_of(kind, each, images=2000, **options):
    return CalibrationSpec(kind, each * images, images, **options)


def all_steps(spec, visited):
    """[images, each, 2]: places and t of many trajectories."""
    return np.array([chosen_steps(spec, visited, T, image) for image in range(spec.images)])


# Which steps


def test_uniform_takes_different_steps_of_each_run_and_covers_all():
    visited = time_steps("leading", 100, T)
    chosen = all_steps(spec_of("uniform", 20, images=200), visited)
    for places in chosen[:, :, 0]:
        assert len(set(places.tolist())) == 20  # no step twice
    assert (
        len({tuple(sorted(places.tolist())) for places in chosen[:, :, 0]}) == 200
    )  # no two runs the same steps
    counts = np.bincount(chosen[:, :, 0].flatten(), minlength=100)
    assert counts.min() > 0
    assert abs(counts - 40).max() < 5 * np.sqrt(40 * 0.8)  # each 40 times, more or less
    first = np.bincount(
        chosen[:, 0, 0] // 10, minlength=10
    )  # in no order: the first one is anywhere, too
    assert first.min() > 5
    assert (chosen[:, :, 1] == np.array(visited)[chosen[:, :, 0]]).all()


def test_uniform_can_take_every_step_but_no_more():
    visited = time_steps("leading", 20, T)
    steps = chosen_steps(CalibrationSpec("uniform", 20, 1), visited, T, 0)
    assert sorted(t for _, t in steps) == sorted(visited)
    with pytest.raises(
        ValueError, match=r"calibration\.samples=21: 21 of each .* has 20 steps; take more"
    ):
        chosen_steps(CalibrationSpec("uniform", 21, 1), visited, T, 0)


@pytest.mark.parametrize("mu, sigma", [(0.4, 0.4), (0.2, 0.1), (0.7, 0.3)])
def test_ndtc_follows_the_clipped_normal_law(mu, sigma):
    visited = time_steps("leading", 100, T)
    chosen = all_steps(spec_of("ndtc", 20, mu=mu, sigma=sigma), visited)
    assert (chosen[:, :, 1] == np.array(visited)[chosen[:, :, 0]]).all()  # x and t are of one step
    t = chosen[:, :, 1].flatten().astype(float)
    drawn = np.clip(np.random.default_rng(0).normal(mu * T, sigma * T, 10 * len(t)), 0, T - 1)
    expected = np.array(sorted(visited))[
        np.clip(np.round(drawn / 10), 0, 99).astype(int)
    ]  # the steps are 0, 10, 20, ...
    error = expected.std() / np.sqrt(len(t))
    assert abs(t.mean() - expected.mean()) < 4 * error
    assert t.std() == pytest.approx(expected.std(), rel=0.02)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs(np.quantile(t, share) - np.quantile(expected, share)) <= 20
    for end in (0, 990):  # what is clipped piles up
        assert (t == end).mean() == pytest.approx((expected == end).mean(), abs=0.01)


def test_ndtc_draws_are_independent_between_and_within_runs():
    visited = time_steps("leading", 100, T)
    t = all_steps(spec_of("ndtc", 4), visited)[:, :, 1].astype(float)
    correlations = np.corrcoef(np.concatenate([t, np.roll(t, 1, axis=0)], axis=1).T)
    assert abs(correlations - np.eye(8)).max() < 0.1


@pytest.mark.parametrize("spacing, steps", [("leading", 100), ("trailing", 50), ("linspace", 200)])
def test_ndtc_published_is_ndtc_with_x_of_the_mirrored_step(spacing, steps):
    visited = time_steps(spacing, steps, T)
    right, mirrored = (
        all_steps(spec_of(kind, 8, images=100), visited) for kind in ("ndtc", "ndtc_published")
    )
    assert (right[:, :, 1] == mirrored[:, :, 1]).all()  # the same t
    taken = np.array(visited)[mirrored[:, :, 0]]
    reach = np.abs((T - 1 - mirrored[:, :, 1])[..., None] - np.array(visited)).min(-1)
    assert (
        np.abs(taken - (T - 1 - mirrored[:, :, 1])) == reach
    ).all()  # the nearest step to T - 1 - t
    assert (np.abs(taken - mirrored[:, :, 1]) > 200).mean() > 0.5


def test_steps_depend_on_seed_and_trajectory_alone():
    visited = time_steps("leading", 50, T)
    for kind in NETWORK_KINDS:
        few, many = CalibrationSpec(kind, 20, 4), CalibrationSpec(kind, 50, 10)
        assert chosen_steps(few, visited, T, 3) == chosen_steps(many, visited, T, 3)
        assert chosen_steps(few, visited, T, 3) != chosen_steps(few, visited, T, 2)
        assert chosen_steps(dataclasses.replace(few, seed=1), visited, T, 3) != chosen_steps(
            few, visited, T, 3
        )


# The files


@pytest.mark.parametrize("kind", [*NETWORK_KINDS, "forward"])
def test_a_set_is_the_same_bits_again_and_other_bits_with_another_seed(
    tmp_path, processes, tiny, groups_of_4, kind
):
    torch.manual_seed(1)
    one = made(processes, tiny, tmp_path / "one", kind)
    torch.manual_seed(2)  # nothing is drawn from the global generator
    two = made(processes, tiny, tmp_path / "two", kind)
    other = made(processes, tiny, tmp_path / "one", kind, seed=1)
    assert one.folder.name == two.folder.name != other.folder.name
    assert bits(one) == bits(two)
    assert sorted(bits(one)) == sorted([*(f"{name}.npy" for name in FILES), "about.json"])
    assert bits(one)["x.npy"] != bits(other)["x.npy"]
    assert len(one) == 30 and one.batch(slice(None))[0].shape == (30, 1, 8, 8)
    assert one.image().tolist() == [i for i in range(10) for _ in range(3)]


@pytest.mark.parametrize("kind", [*NETWORK_KINDS, "forward"])
def test_interrupted_and_continued_is_the_same_bytes(
    tmp_path, processes, tiny, groups_of_4, kind, monkeypatch
):
    whole = made(processes, tiny, tmp_path / "whole", kind)
    put, calls = GroupedArrays.put, []

    def killed(self, group, **rows):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(group)
        put(self, group, **rows)

    monkeypatch.setattr(GroupedArrays, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        made(processes, tiny, tmp_path / "killed", kind)
    monkeypatch.setattr(
        GroupedArrays,
        "put",
        lambda self, group, **rows: calls.append(group) or put(self, group, **rows),
    )
    continued = made(processes, tiny, tmp_path / "killed", kind)
    assert calls == [0, 1, 2]  # what was there is not made again
    assert bits(continued) == bits(whole)


def test_killed_while_a_group_was_being_written_is_the_same_bytes(
    tmp_path, processes, tiny, groups_of_4
):
    whole = made(processes, tiny, tmp_path)
    before = bits(whole)
    x, done = (np.load(whole.folder / f"{name}.npy", mmap_mode="r+") for name in ("x", "groups"))
    x[12:20], done[1] = 7, 0
    x.flush(), done.flush()
    del x, done
    assert whole.missing() == [1]
    assert bits(made(processes, tiny, tmp_path)) == before


def test_killed_while_its_files_were_being_made_is_the_same_bytes(
    tmp_path, processes, tiny, groups_of_4
):
    whole = made(processes, tiny, tmp_path / "whole")
    folder = tmp_path / "killed" / "calibration_sets" / whole.folder.name
    folder.mkdir(parents=True)
    np.save(folder / "x.npy", np.zeros((30, 1, 8, 8), np.float32))
    abandoned = folder / ".t.npy.0badc0de.part"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    found = made(processes, tiny, tmp_path / "killed")
    assert found.folder == folder
    assert bits(found) == bits(whole)


def test_a_finished_set_is_not_touched(tmp_path, processes, tiny, groups_of_4, monkeypatch):
    first = made(processes, tiny, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    monkeypatch.setattr(calibration_set, "_trajectories", None)  # would be called
    second = made(processes, tiny, tmp_path)
    third = made(processes, tiny, tmp_path / "elsewhere", path=first.folder)
    assert second.folder == third.folder == first.folder
    assert before == {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    assert not (tmp_path / "elsewhere").exists()


def test_a_set_of_more_runs_begins_with_the_same_runs(tmp_path, processes, tiny, groups_of_4):
    few = made(processes, tiny, tmp_path, samples=15, images=5)
    many = made(processes, tiny, tmp_path, samples=30, images=10)
    assert torch.equal(many.batch(slice(0, 15))[0], few.batch(slice(None))[0])
    assert torch.equal(ends(many)[:5], ends(few))


@pytest.mark.parametrize("kind", NETWORK_KINDS)
def test_x_is_the_runs_own_at_that_step_bit_for_bit(tmp_path, processes, tiny, groups_of_4, kind):
    model, net = tiny
    found = made(processes, tiny, tmp_path, kind, seed=5)
    x, t, _ = found.batch(slice(None))
    image = found.image()
    sampler = Ddim(6)
    for group in range(3):
        runs = range(4 * group, 4 * group + 4)  # the last two of the last group are padding
        seen = {}
        end = sampler.sample(
            lambda x_t, step: model.predict(net, x_t, step),
            starting_noise([generator(5, Stream.TRAJECTORY, i) for i in runs], model.sample_shape),
            model.schedule,
            on_step=lambda step, x_t, seen=seen: seen.update({step: x_t.clone()}),
        )
        assert list(seen) == [830, 664, 498, 332, 166, 0]
        for sample in np.flatnonzero((image >= runs.start) & (image < runs.stop)):
            row, at = int(image[sample]) - runs.start, int(t[sample])
            if kind == "ndtc_published":
                at = min(seen, key=lambda step: abs(T - 1 - at - step))
            assert torch.equal(x[sample], seen[at][row])
        here = slice(runs.start, min(runs.stop, 10))
        assert torch.equal(ends(found)[here], end[: here.stop - here.start])


def test_forward_sets_are_training_images_noised_to_their_own_t(
    tmp_path, processes, tiny, groups_of_4
):
    model, _ = tiny
    found = made(processes, tiny, tmp_path, "forward", samples=400, images=20)
    (x, t, _), image, x_0 = found.batch(slice(None)), found.image(), ends(found)
    assert image.tolist() == [i for i in range(20) for _ in range(20)]
    pictures = SomeImages().batch(torch.arange(10), torch.zeros(10, dtype=torch.bool))
    which = [int((pictures == end).flatten(1).all(1).nonzero()) for end in x_0]
    assert sorted(which[:10]) == list(range(10))  # each once, then once more
    abar = model.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    eps = (
        (x.double() - abar.sqrt() * x_0[torch.from_numpy(image)].double()) / (1 - abar).sqrt()
    ).flatten(1)
    assert abs(float(eps.mean())) < 0.03 and float(eps.std()) == pytest.approx(1, abs=0.03)
    assert (
        float(abs(torch.corrcoef(eps) - torch.eye(400)).max()) < 0.7
    )  # no two samples share their noise
    assert torch.histc(t.float(), 10, 0, 1000).tolist() == [40.0] * 10  # evenly over all of time
    assert len(t.unique()) > 330


# The pairing


@pytest.fixture(scope="module")
def digits():
    built = jobs.build(compose(["model=digits", "method=fp", "sampler.steps=50", "tracker=none"]))
    net = built.model.build()
    built.weights.load(built.model, net)
    return built.model, net.eval()


@torch.no_grad()
def errors_at(digits, found, told):
    """Of every sample: |eps_hat(x_t, t') - eps(t')|^2, and how much of its run's x_0 there is in eps(t').

    eps(t') = (x_t - sqrt(abar_t') x_0) / sqrt(1 - abar_t'),   |<eps(t'), x_0>| / |x_0|^2
    """
    model, net = digits
    x, _, _ = found.batch(slice(None))
    x_0 = ends(found)[torch.from_numpy(found.image())]
    abar = model.schedule.alphas_cumprod[told].reshape(-1, 1, 1, 1)
    eps = ((x - abar.sqrt() * x_0) / (1 - abar).sqrt()).float()
    error = (model.predict(net, x, told) - eps).square().flatten(1).mean(1)
    return error, ((eps * x_0).flatten(1).sum(1) / x_0.square().flatten(1).sum(1)).abs()


@pytest.fixture(scope="module")
def pairing(tmp_path_factory, processes, digits):
    """By kind of set: what is lower at the stored t than at another one, on average over the same samples.

    A network that is told too large a t errs little whatever it is shown: it sees x_0 more clearly than it expects to,
    and the noise of every x_t is nearly x_t itself. So its error tells a wrong t by its distance, both ways together;
    what is left of x_0 in the noise tells it by its direction, too.
    """
    model, net = digits
    answers = {}
    for kind in NETWORK_KINDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration_set, "GROUP", 8)
            found = make_set(
                CalibrationSpec(kind, 96, 8), Denoiser(net, model), Ddim(50), SomeImages(), parts={"kind": kind},
                cache=tmp_path_factory.mktemp("pairs"), processes=processes,
            )  # fmt: skip
        t = found.times()
        own, mirrored = errors_at(digits, found, t), errors_at(digits, found, T - 1 - t)
        lower = {
            name: {"mirrored": float(o.mean()) < float(m.mean())}
            for name, o, m in zip(("error", "x_0 left"), own, mirrored, strict=True)
        }
        for distance in (200, 400, 600, 800):
            sides = []
            for told in (t - distance, t + distance):
                inside = (told >= 0) & (told < T)
                there = errors_at(digits, found, told.clamp(0, T - 1))
                sides.append(
                    [(o[inside], other[inside]) for o, other in zip(own, there, strict=True)]
                )
            # Both sides of the error together: the larger t by itself would say nothing.
            here, there = (torch.cat([side[0][k] for side in sides]).mean() for k in (0, 1))
            lower["error"][distance] = bool(here < there)
            for sign, side in zip((-1, 1), sides, strict=True):
                assert len(side[1][0]) >= 8
                lower["x_0 left"][sign * distance] = bool(side[1][0].mean() < side[1][1].mean())
        answers[kind] = lower
    return answers


@pytest.mark.parametrize("measure", ["error", "x_0 left"])
@pytest.mark.parametrize("kind", ["uniform", "ndtc"])
def test_x_goes_with_its_own_t_better_than_with_any_other(pairing, kind, measure):
    assert len(pairing[kind][measure]) >= 5
    assert all(pairing[kind][measure].values()), pairing[kind][measure]


@pytest.mark.parametrize("measure", ["error", "x_0 left"])
def test_the_published_pairing_fails_that_test(pairing, measure):
    assert not any(
        pairing["ndtc_published"][measure][other] for other in ("mirrored", 200, 400, 600, 800)
    )


# Refusals


@pytest.fixture(scope="module")
def sound(tmp_path_factory, processes, tiny):
    return made(processes, tiny, tmp_path_factory.mktemp("sound"))


@pytest.fixture
def stored(tmp_path, sound):
    """A finished set that may be damaged."""
    folder = shutil.copytree(sound.folder, tmp_path / "stored")
    of = json.loads((folder / "about.json").read_text())["fingerprint"]
    shape, group = (1, 8, 8), calibration_set.GROUP
    return CalibrationSet(folder, sound.samples, sound.images, shape, group, of=of)


PARTS = (
    {"network": "tiny", "schedule": {"beta_end": 0.02}},
    "abc",
    dataclasses.asdict(Ddim(6)),
    "digits",
)


@pytest.mark.parametrize(
    "said, parts, options",
    [
        ("weights: abc -> xyz", (PARTS[0], "xyz", *PARTS[2:]), {}),
        (
            "model.schedule.beta_end: 0.02 -> 0.03",
            ({**PARTS[0], "schedule": {"beta_end": 0.03}}, *PARTS[1:]),
            {},
        ),
        ("sampler.steps: 6 -> 7", (*PARTS[:2], dataclasses.asdict(Ddim(7)), PARTS[3]), {}),
        ("calibration.seed: 0 -> 4", PARTS, {"seed": 4}),
        ("calibration.samples: 30 -> 60", PARTS, {"samples": 60}),
        ("calibration.kind: uniform -> ndtc", PARTS, {"kind": "ndtc"}),
    ],
)
def test_a_set_of_other_parts_is_refused_with_the_difference(
    tmp_path, processes, tiny, groups_of_4, said, parts, options
):
    first = CalibrationSpec("uniform", 30, 10).parts(*PARTS)
    found = made(processes, tiny, tmp_path, parts=first)
    before = bits(found)
    wanted = {"kind": "uniform", "samples": 30, "images": 10, **options}
    other = CalibrationSpec(**wanted).parts(*parts)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(found.folder))}: .*{re.escape(said)}"
    ) as error:
        made(processes, tiny, tmp_path, path=found.folder, parts=other, **wanted)
    assert "\n" not in str(error.value)
    assert "leave calibration.path out" in str(error.value)
    assert bits(found) == before


def test_what_a_set_does_not_depend_on_is_not_among_its_parts():
    uniform, forward = CalibrationSpec("uniform", 30, 10), CalibrationSpec("forward", 30, 10)
    assert uniform.parts(*PARTS) == dataclasses.replace(uniform, mu=0.1, sigma=0.2).parts(
        *PARTS[:3], "cifar10"
    )
    assert forward.parts(*PARTS) == forward.parts(
        PARTS[0], "xyz", dataclasses.asdict(Ddim(50)), "digits"
    )
    assert forward.parts(*PARTS) != forward.parts(*PARTS[:3], "cifar10")
    ndtc = CalibrationSpec("ndtc", 30, 10)
    assert ndtc.parts(*PARTS) != dataclasses.replace(ndtc, mu=0.1).parts(*PARTS)
    assert json.loads(json.dumps(ndtc.parts(*PARTS))) == ndtc.parts(*PARTS)  # as they are read back


def test_a_path_without_a_set_is_an_error_that_names_the_key(tmp_path, processes, tiny):
    with pytest.raises(
        FileNotFoundError, match=r"^calibration\.path=.*nowhere: holds no calibration set"
    ):
        made(processes, tiny, tmp_path, path=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


READ = {
    "x": lambda found: found.batch(slice(0, 4)), "t": lambda found: found.batch(slice(0, 4)),
    "image": CalibrationSet.image, "x_0": lambda found: ends(found), "groups": CalibrationSet.missing,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "empty", "garbage", "other shape", "other type"]
)
def test_a_damaged_or_missing_file_is_one_clear_line(stored, name, damage):
    path = stored.folder / f"{name}.npy"
    array = np.load(path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "garbage":
        path.write_bytes(b"not an array, and long enough to have a header of its own" * 9)
    else:
        np.save(path, array[:-1] if damage == "other shape" else array.astype(np.float16))
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}: .*remove {re.escape(str(stored.folder))}"
    ) as error:
        READ[name](stored)
    assert "\n" not in str(error.value)


def test_a_damaged_about_file_is_one_clear_line(stored):
    about = stored.folder / "about.json"
    about.write_text(about.read_text()[:-20])
    with pytest.raises(ValueError, match=r"about\.json: damaged .*remove it"):
        require_parts(stored.folder, {})


def test_a_folder_that_cannot_be_written_is_one_line_that_says_what_to_set(
    tmp_path, processes, tiny, groups_of_4
):
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    with pytest.raises(
        OSError, match=r"calibration_sets/.*can't be written \(.*\); .*data\.cache=FOLDER"
    ):
        made(processes, tiny, tmp_path / "cache")


@pytest.mark.parametrize(
    "options, said",
    [
        (
            {"kind": "normal"},
            "calibration.kind='normal': choose one of uniform, ndtc, ndtc_published, forward",
        ),
        (
            {"samples": 31},
            "calibration.samples=31: must be a positive multiple of calibration.images=10",
        ),
        (
            {"samples": 0},
            "calibration.samples=0: must be a positive multiple of calibration.images=10",
        ),
        (
            {"images": 0},
            "calibration.samples=30: must be a positive multiple of calibration.images=0",
        ),
        (
            {"samples": 5},
            "calibration.samples=5: must be a positive multiple of calibration.images=10",
        ),
    ],
)
def test_a_spec_that_makes_no_sense_names_its_key(options, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        CalibrationSpec(**{"kind": "uniform", "samples": 30, "images": 10, **options})
