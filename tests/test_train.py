"""train.py on real pictures, a few steps at a time."""

import json
import math

import torch
from conftest import TINY
from safetensors.torch import load_file

import train
from checkpoint import checkpoints, load_weights
from train import batch_indices


def start(pictures, out, *more):
    train.main(list(map(str, [*TINY, "--data", pictures, "--out", out, *more])))


def tensors(folder):
    """All tensors of a checkpoint: weights, averaged weights, optimizer."""
    return {f"{p.name} {k}": v for p in folder.rglob("*.safetensors") for k, v in load_file(p).items()}


def assert_equal(a, b, tolerance=0.0):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def test_a_run_leaves_what_it_should(pictures, tmp_path):
    out = tmp_path / "run"
    start(
        pictures, out, "--max-steps", 12, "--sample-every", 12, "--save-every", 5, "--log-with", "tensorboard"
    )
    assert [c.name for c in checkpoints(out)] == [
        "checkpoint-0000010",
        "checkpoint-0000012",
    ]  # the newest two
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(e["step"], e["pictures"]) for e in entries] == [(10, 40), (12, 48)]
    assert all(math.isfinite(e["loss"]) for e in entries)
    assert (
        list(out.rglob("events.out.tfevents*")) and (out / "samples" / "0000012.png").stat().st_size > 10000
    )
    _, _, metadata = load_weights(out)
    assert metadata["model"] == "small" and metadata["pictures_seen"] == 48
    assert metadata["data"]["pictures"] == 12 and metadata["data"]["labelled"] == 18009
    assert not list(out.glob("*.tmp"))


def test_training_learns(pictures, tmp_path):
    """On four scenes the loss must fall well below that of predicting nothing."""
    start(pictures, tmp_path, "--max-steps", 60, "--learning-rate", 2e-3, "--warmup-steps", 5)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_resume_is_exact(pictures, tmp_path, capsys):
    """7 + 5 steps give what 12 give, bit for bit, with EMA, warm-up, decay and label dropout on."""
    common = ["--warmup-steps", 4, "--label-dropout", 0.3, "--max-steps", 12, "--save-every", 7]
    start(pictures, tmp_path / "whole", *common)
    start(pictures, tmp_path / "parts", *common)
    newest = checkpoints(tmp_path / "parts")[-1]
    (newest / "metadata.json").unlink()  # as if the run had been stopped while it wrote this one
    start(pictures, tmp_path / "parts", *common)
    assert "goes on at step 7 of 12" in capsys.readouterr().out
    assert_equal(checkpoints(tmp_path / "whole")[-1], checkpoints(tmp_path / "parts")[-1])
    logs = [[json.loads(x) for x in (tmp_path / n / "log.jsonl").open()] for n in ("whole", "parts")]
    assert logs[0][-1]["loss"] == logs[1][-1]["loss"]
    stamp = checkpoints(tmp_path / "parts")[-1].stat().st_mtime_ns
    start(pictures, tmp_path / "parts", *common)  # nothing left to do
    assert checkpoints(tmp_path / "parts")[-1].stat().st_mtime_ns == stamp


def test_another_recipe_is_not_mixed_in(pictures, tmp_path, refused):
    start(pictures, tmp_path, "--max-steps", 2)
    before = tensors(tmp_path)
    argv = [*TINY, "--data", pictures, "--out", tmp_path, "--max-steps", 4, "--learning-rate", 1]
    refused(train.main, argv, tmp_path, "learning_rate", "--out")
    assert tensors(tmp_path).keys() == before.keys()


def test_accumulation_keeps_the_result(pictures, tmp_path):
    common = ["--max-steps", 3, "--warmup-steps", 0, "--learning-rate", 1e-4]
    start(pictures, tmp_path / "whole", *common)
    start(pictures, tmp_path / "halves", *common, "--batch-size", 2, "--grad-accum", 2)
    a, b = (tmp_path / n / "checkpoint-0000003" for n in ("whole", "halves"))
    torch.testing.assert_close(
        load_file(a / "training" / "model.safetensors"), load_file(b / "training" / "model.safetensors"),
        rtol=0, atol=2e-5,
    )  # fmt: skip


def test_two_processes_train_what_one_does(pictures, tmp_path, run):
    common = [*TINY, "--data", pictures, "--max-steps", 2, "--warmup-steps", 0, "--learning-rate", 1e-4]
    train.main(list(map(str, [*common, "--out", tmp_path / "one"])))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    process = run(train.ROOT, *launch, "train.py", *common, "--out", tmp_path / "two")
    assert process.returncode == 0, process.stderr[-3000:]
    a, b = (tmp_path / n / "checkpoint-0000002" / "training" / "model.safetensors" for n in ("one", "two"))
    torch.testing.assert_close(load_file(a), load_file(b), rtol=0, atol=2e-5)


def test_init_starts_from_weights(pictures, tmp_path):
    start(pictures, tmp_path / "a", "--max-steps", 2)
    start(pictures, tmp_path / "b", "--max-steps", 1, "--learning-rate", 0, "--init", tmp_path / "a")
    a, b = (checkpoints(tmp_path / n)[-1] / "unet" / "diffusion_pytorch_model.safetensors" for n in "ab")
    assert all(torch.equal(load_file(a)[k], v) for k, v in load_file(b).items())


def test_dry_run_and_missing_pictures_write_nothing(pictures, tmp_path, capsys, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    train.main(["--model", "tiny-mixed", "--data", str(pictures), "--max-steps", "50", "--dry-run"])
    out = capsys.readouterr().out
    assert "no CUDA: 50 steps will take about" in out and "--model small" in out
    refused(train.main, ["--model", "small", "--data", "iclevr"], "iclevr", "python render.py")
    assert not list(tmp_path.iterdir())


def test_trains_on_the_pack_where_there_are_no_pictures(clone, run):
    process = run(clone, "train.py", *TINY, "--max-steps", 2)
    assert process.returncode == 0, process.stderr
    assert "iclevr.npz: 18,009 pictures" in process.stdout


def test_every_picture_is_seen_once_per_epoch():
    stream = torch.cat([batch_indices(step, 8, 30, seed=4) for step in range(15)])  # four epochs of 30
    for epoch in stream.split(30):
        assert sorted(epoch.tolist()) == list(range(30))
    assert not torch.equal(stream[:30], stream[30:60])
    assert not torch.equal(stream[:8], batch_indices(0, 8, 30, seed=5))
    assert sorted(batch_indices(0, 50, 7, seed=4).bincount().tolist()) == [7] * 6 + [
        8
    ]  # fewer pictures than a batch
