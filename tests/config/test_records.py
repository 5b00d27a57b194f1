"""Records name our own classes by their faces; older names are read, and strangers' are refused."""

import copy
import json
from pathlib import Path

import pytest

from tdq_exp.config import records
from tdq_exp.experiment import build as jobs
from tdq_exp.runtime.files import read_json

RUN = (
    Path(__file__).resolve().parents[2]
    / "results"
    / "runs"
    / "digits_w4a4_lsq_tdq"
    / "seed0"
    / "fit.json"
)


def test_older_names_are_read_as_todays():
    old = {
        "act": {"quantizer": {"_target_": "tdq_exp.quant.lsq.Lsq", "_partial_": True}},
        "tdq": {"offset": "by_role"},
        "sampler": {"offset": 1, "method": {"_target_": "tdq_exp.diffusion.sampler.Ddim"}},
        "eval": {"metrics": ["fid"]},
        "seed": 3,
    }
    assert records.upgrade(old) == {
        "act": {"quantizer": {"_target_": "tdq_exp.quant.Lsq", "_partial_": True}},
        "tdq": {"zero_point": "by_role"},
        "sampler": {"offset": 1, "method": {"_target_": "tdq_exp.diffusion.Ddim"}},
        "eval": {"metrics": ["fid"]},
        "seed": 3,
    }
    assert records.upgrade(records.upgrade(old)) == records.upgrade(old)


def test_every_older_name_leads_to_something_that_there_is():
    records.require_known([{"_target_": face} for face in records.MOVED.values()], "here")


@pytest.mark.parametrize(
    "target",
    [
        "subprocess.run", "builtins.open", "os.system", "tdq_exp.quant.rules.lsq.Lsq", "tdq_exp.fit.os.system",
        "tdq_exp.quant.convert", "tdq_exp.quant.__import__", "torch.load", "tdq_exp.run.main", "", 3, ["x"],
        "tdq_exp.quant.PerStep",
    ],
)  # fmt: skip
def test_a_strangers_record_calls_nothing(target, tmp_path, monkeypatch):
    config = copy.deepcopy(read_json(RUN)["config"])
    marker = tmp_path / "called"
    config["plan"]["plan"] = {"_target_": target, "_args_": [["touch", str(marker)]]}
    with pytest.raises(ValueError, match=r"stranger\.json: names .* not a part of tdq_exp"):
        jobs.rebuild(json.loads(json.dumps(config)), Path("stranger.json"))
    assert not marker.exists()


@pytest.mark.parametrize("group", ["habits", "plan", "model"])
def test_a_value_that_would_be_computed_calls_nothing(group, tmp_path):
    marker = tmp_path / "copied"
    hidden = f"${{oc.decode:'{{_target_: shutil.copyfile, src: {RUN}, dst: {marker}}}'}}"
    config = copy.deepcopy(read_json(RUN)["config"])
    key = "definition" if group == "model" else group
    config[group][key] = hidden
    with pytest.raises(ValueError, match=r"stranger\.json: holds .* no interpolations"):
        jobs.rebuild(config, Path("stranger.json"))
    assert not marker.exists()
