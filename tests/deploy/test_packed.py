"""Packed networks: every bit comes back, in as many bytes as the codes need."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import tdq_exp
from tdq_exp.commands.pack import pack
from tdq_exp.config.compose import compose
from tdq_exp.deploy import choose, packed
from tdq_exp.experiment import build as jobs
from tdq_exp.experiment import pipeline, sample_stage
from tdq_exp.experiment.finished_run import load


def slow(codes: list[int], n: int, bits: int) -> list[int]:
    """Bit by bit, lowest first."""
    stream = [(code - n) >> bit & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(stream[i + bit] << bit for bit in range(8)) for i in range(0, len(stream), 8)]


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("n", [0, -7, -32768])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2), (0,)])
def test_codes_come_back_from_as_few_bytes_as_they_need(bits, n, shape):
    codes = torch.randint(n, n + 2**bits, shape, generator=torch.Generator().manual_seed(bits))
    found = packed.pack_codes(codes, n, bits)
    assert found.dtype == torch.uint8 and found.tolist() == slow(codes.flatten().tolist(), n, bits)
    assert torch.equal(packed.unpack_codes(found, shape, n, bits).long(), codes)


def test_chunks_join_without_a_seam(monkeypatch):
    codes = torch.randint(-3, 5, (1001,), generator=torch.Generator().manual_seed(0))
    whole = packed.pack_codes(codes, -3, 3)
    monkeypatch.setattr(packed, "CHUNK", 16)
    assert torch.equal(packed.pack_codes(codes, -3, 3), whole)
    assert torch.equal(packed.unpack_codes(whole, (1001,), -3, 3).long(), codes)


def test_two_four_bit_codes_share_a_byte():
    assert packed.pack_codes(torch.tensor([-7, 7, 0, 1]), -7, 4).tolist() == [0xE0, 0x87]


RUNS = {
    "qat": ["method=lsq", "tdq=temporal", "fit.calibration_samples=64"],
    "post-training": ["method=minmax", "tdq=none", "bits=w8a8"],
}


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS.keys())
def run(request, tmp_path_factory, tiny_weights):
    """The folder of a finished run, which the tests only read."""
    out = tmp_path_factory.mktemp("run")
    quick = [
        "model=tiny",
        "tracker=none",
        "launcher=cpu",
        "protocol.qat.calibration_samples=64",
        f"out={out}",
    ]
    made = jobs.build(compose([*quick, f"model.weights={tiny_weights}", *request.param]))
    pipeline.run(made)
    return made.folder


def test_a_packed_run_is_the_same_network_and_needs_nothing_else(run, tmp_path):
    file = pack(run, tmp_path / "net.safetensors")
    made, net = load(file)
    before = tdq_exp.load(run).state_dict()
    after = net.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    x, t = torch.randn(2, *made.model.sample_shape), torch.tensor(400)
    with torch.no_grad():
        assert torch.equal(tdq_exp.load(run)(x, t).sample, tdq_exp.load(file)(x, t).sample)
    codes = sum(v.numel() for k, v in before.items() if k.endswith(".codes"))
    state, how = packed.pack(before)
    stored = sum(v.numel() for k, v in state.items() if k.endswith(".codes"))
    bits = {rule["codes"] for rule in how.values() if "codes" in rule}
    assert stored <= codes * max(bits) / 8 + len(how) and max(bits) <= (
        8 if "w8" in made.name else 4
    )


def test_what_is_wrong_with_a_file_is_one_line(run, tmp_path):
    file = pack(run, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="exists; remove it or name another"):
        pack(run, file)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a packed network"):
        tdq_exp.load(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cut\.safetensors: damaged"):
        tdq_exp.load(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"none\.safetensors: damaged or missing"):
        tdq_exp.load(tmp_path / "none.safetensors")


def test_the_commands_pack_and_draw(run, tmp_path, inside, monkeypatch):
    done = inside(str(run), "--out", "net.safetensors", verb="pack")
    assert done.returncode == 0 and "read back and compared" in done.stdout, done.stderr

    # Layers are timed and images computed in float32, on a GPU too.
    rounded, group, timed = [], sample_stage.sample_group, choose.timed

    def noting(function):
        def noted(*arguments, **options):
            flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            rounded.append((function.__name__, *flags))
            return function(*arguments, **options)

        return noted

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(sample_stage, "sample_group", noting(group))
    monkeypatch.setattr(choose, "timed", noting(timed))
    drawn = inside(
        "net.safetensors", "--images", "3", "--engine", "integer", "--out", "drawn", verb="sample"
    )
    assert drawn.returncode == 0, drawn.stderr
    assert ("sample_group", False, False) in rounded
    assert not any(flag for _, *flags in rounded for flag in flags)
    assert torch.backends.cudnn.allow_tf32, "as it was before"
    assert (tmp_path / "drawn" / "grid.png").stat().st_size > 0
    again = inside("net.safetensors", "--images", "4", "--out", "drawn", verb="sample")
    assert again.returncode == 2 and "drawn: is not empty; name another" in again.stderr
    refused = inside("x", "--engine", "warp", verb="sample")
    assert (
        refused.returncode == 2
        and "--engine=warp" in refused.stderr
        and "Traceback" not in refused.stderr
    )


def test_a_command_starts_as_a_process_and_packing_refuses_what_is_not_there(command, inside):
    for start, verb in ((command, "verify"), (inside, "pack")):  # the first needs no torch
        done = start("nowhere", verb=verb)
        assert done.returncode == 2 and "nowhere" in done.stderr and done.stderr.count("\n") == 1
