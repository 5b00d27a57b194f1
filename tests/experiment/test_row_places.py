"""Where a row was made, for readers."""

from tdq_exp.experiment.row import environments, machine_of

HERE = {"machine": "Linux, 2 cores", "commit": "a"}
THERE = {"machine": "Linux, 16 cores", "accelerator": "NVIDIA H200", "commit": "b"}


def test_a_row_names_every_machine_once():
    assert environments({"environment": HERE}) == [HERE]
    row = {"environment": HERE, "fitted_on": THERE, "sampled_on": [THERE, HERE]}
    assert environments(row) == [HERE, THERE]
    assert [machine_of(place) for place in environments(row)] == [
        "Linux, 2 cores",
        "Linux, 16 cores, NVIDIA H200",
    ]
