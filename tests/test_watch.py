"""Numbers that are not finite stop a run before they get into the weights."""

import pytest

import train
from checkpoint import checkpoints
from runs import contents

BREAKING = ["--learning-rate", 1e30, "--warmup-steps", 0, "--optimizer", "adamw", "--max-steps", 9]


def last_line_of(argv: list[str], capsys) -> str:
    """Of the error by which train.py ends."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_its_pictures_are_named(argv, tmp_path, capsys, tried):
    """The last checkpoint stays as it is."""
    line = last_line_of(argv(tmp_path, *BREAKING, "--save-every", 1), capsys)
    [saved] = checkpoints(tmp_path)
    assert saved.name == "checkpoint-0000001"
    assert "in step 2, stopped before the weights were touched" in line and f"checkpoint: {saved};" in line
    assert "loss " in line and line.count("CLEVR_train_") == 8 and line.count(".png") == 8
    assert all(value.isfinite().all() for value in contents(saved).values())
    tried("a loss or gradient that is not finite", "exit 2 before the step changes a weight; names step and pictures")


def test_a_loss_that_is_looked_at_a_step_later_stops_the_run_before_a_weight_changes(argv, tmp_path, capsys):
    """AdamW leaves the weights alone by itself: nothing need be saved in between for the step to be found."""
    line = last_line_of(argv(tmp_path, *BREAKING), capsys)
    assert not checkpoints(tmp_path)
    assert "in step 2, stopped before the weights were touched; last good checkpoint: none yet" in line
