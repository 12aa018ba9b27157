"""train.py on real pictures, a few steps at a time."""

import json
import math

import torch
from conftest import METADATA, ROOT, TINY, TORCHRUN
from safetensors.torch import load_file

import checkpoint
import train
from checkpoint import checkpoints, load_weights
from infra.files import load_json
from model import build
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
    start(pictures, tmp_path, "--max-steps", 40, "--learning-rate", 2e-3, "--warmup-steps", 5)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_two_processes_train_what_one_does(pictures, tmp_path, run):
    """With averaged weights and label dropout; after 20 steps only rounding differs. With AdamW: Muon works
    in bf16, in which the order of a sum shows. `accelerate launch`: test_several_processes_stop_together."""
    common = [*TINY, "--data", pictures, "--label-dropout", 0.3, "--warmup-steps", 0, "--learning-rate", 1e-4]
    common += ["--optimizer", "adamw", "--max-steps", 20]
    train.main(list(map(str, [*common, "--out", tmp_path / "one"])))
    process = run(train.ROOT, *TORCHRUN, "train.py", *common, "--out", tmp_path / "two")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "setup: cpu, 2 processes, fp32" in process.stdout
    torch.manual_seed(0)
    initial = build("small")[0].state_dict()

    def weights(run: str, file: str) -> torch.Tensor:
        found = tensors(checkpoints(tmp_path / run)[-1])
        return torch.cat([found[f"{file}.safetensors {name}"].flatten() for name in initial])

    start = torch.cat([tensor.flatten() for tensor in initial.values()])
    for file in ("diffusion_pytorch_model", "model"):  # averaged weights, weights
        one, two = weights("one", file), weights("two", file)
        assert (one - two).norm() < 1e-3 * (one - start).norm()


def test_processes_that_accelerate_does_not_start_are_told(tmp_path, run):
    """Without MPI it starts one process on CPUs."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2]
    process = run(train.ROOT, *launch, "train.py", *TINY, "--out", tmp_path / "run")
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert "error: accelerate launch --cpu starts a single process" in process.stderr
    assert "torchrun --nproc_per_node N" in process.stderr


def test_init_starts_from_weights(pictures, tmp_path):
    start(pictures, tmp_path / "a", "--max-steps", 2)
    start(pictures, tmp_path / "b", "--max-steps", 1, "--learning-rate", 0, "--init", tmp_path / "a")
    a, b = (checkpoints(tmp_path / n)[-1] / "unet" / "diffusion_pytorch_model.safetensors" for n in "ab")
    assert all(torch.equal(load_file(a)[k], v) for k, v in load_file(b).items())


def test_init_takes_the_network_of_the_weights_and_wants_their_model(pictures, tmp_path, refused):
    shipped = ROOT / "weights" / "small"  # two layers a block, the preset has one
    start(pictures, tmp_path / "run", "--max-steps", 1, "--init", shipped)
    run, weights = (
        load_json(p / "unet" / "config.json") for p in (checkpoints(tmp_path / "run")[-1], shipped)
    )
    assert run["layers_per_block"] == weights["layers_per_block"] == 2
    tiny = ["--model", "tiny-mixed", "--data", pictures, "--out", tmp_path / "tiny", "--init", shipped]
    refused(train.main, tiny, "weights of --model small, not of tiny-mixed")
    assert not (tmp_path / "tiny").exists()


def test_what_triples_were_not_seen_is_stored(pictures, tmp_path):
    start(pictures, tmp_path / "a", "--max-steps", 1)
    start(pictures, tmp_path / "b", "--max-steps", 1, "--init", tmp_path / "a")
    unseen = [load_weights(tmp_path / name)[2]["unseen"] for name in "ab"]
    seen = {frozenset(c) for c in json.loads((train.ROOT / "train.json").read_text()).values()}
    assert len(unseen[0]) == 100 and unseen[0] == unseen[1]
    assert not seen & set(map(frozenset, unseen[0]))


def test_a_run_in_channels_last_resumes(tmp_path):
    """As on CUDA: fused AdamW pairs weights and moments by their place in memory."""

    def steps(model, optimizer, numbers):
        for i in numbers:
            torch.manual_seed(i)
            model(
                torch.randn(2, 3, 64, 64), torch.tensor([3, 900]), torch.ones(2, 24)
            ).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def begin():
        torch.manual_seed(0)
        model, noise_scheduler = build("small")
        model.to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), noise_scheduler

    metadata = METADATA | {"losses": []}
    whole, optimizer, noise_scheduler = begin()
    steps(whole, optimizer, [1, 2])
    checkpoint.save(tmp_path, whole, whole, optimizer, noise_scheduler, metadata)
    steps(whole, optimizer, [3, 4])
    parts, optimizer, _ = begin()
    assert checkpoint.resume(checkpoints(tmp_path)[-1], parts, parts, optimizer, None, metadata) == metadata
    steps(parts, optimizer, [3, 4])
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=1e-6)


def test_dry_run_and_missing_pictures_write_nothing(pictures, tmp_path, capsys, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "tiny-mixed", "--data", pictures, "--max-steps", 50, "--mixed-precision", "no"]
    train.main([*map(str, argv), "--dry-run"])
    out = capsys.readouterr().out
    assert "no CUDA: 50 steps will take about" in out and "--model small" in out
    assert "setup: cpu, fp32 (asked for), contiguous_format (" in out and "not compiled (" in out
    refused(train.main, ["--model", "small", "--data", "iclevr"], "iclevr", "python -m data.render")
    assert not list(tmp_path.iterdir())


def test_a_part_of_the_pictures_is_not_taken_silently(
    pictures, tmp_path, capsys, monkeypatch, refused, tried
):
    """`render.py --limit 4` leaves a folder that train.py would prefer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "iclevr").symlink_to(pictures)
    refused(train.main, [*TINY, "--max-steps", 2], "iclevr: only 12 of 18,009 pictures", "--data iclevr")
    assert [path.name for path in tmp_path.iterdir()] == ["iclevr"]
    train.main([*TINY, "--max-steps", "2", "--data", "iclevr", "--dry-run"])
    assert "iclevr: 12 of 18,009 pictures" in capsys.readouterr().out
    tried("a part of the pictures in iclevr/", "exit 2: iclevr: only 12 of 18,009 pictures are rendered; ...")


def test_the_time_left_is_that_of_the_steps_left(pictures, tmp_path, capsys):
    common = ("--lr-schedule", "constant", "--max-steps")
    start(pictures, tmp_path / "run", *common, 2)
    assert "no CUDA: 2 steps will take about" in capsys.readouterr().out
    start(pictures, tmp_path / "run", *common, 5)
    assert "no CUDA: 3 steps will take about" in capsys.readouterr().out


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
