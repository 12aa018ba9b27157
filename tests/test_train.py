"""train.py on real pictures, a few steps at a time."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import sample
import train
from bookkeeping import run as bookkeeping
from checkpoint import checkpoints, load_weights, steps_done
from conftest import ROOT, SHIPPED, TINY, TORCHRUN
from dataset import batch_indices
from diffusion import target_of
from infra.files import load_json
from model import build
from runs import log_of, tensors


def start(pictures: Path, out: Path, *more):
    """Train `small`, in fp32 and in batches of four, into a folder."""
    train.main([str(option) for option in [*TINY, "--data", pictures, "--out", out, *more]])


# ------------------------------------------------------------------------------------------------ a few steps


@pytest.mark.slow
def test_a_run_leaves_checkpoints_a_log_a_grid_and_events(pictures, tmp_path):
    out = tmp_path / "run"
    common = ["--max-steps", 12, "--sample-every", 12, "--save-every", 5]
    start(pictures, out, *common, "--log-with", "tensorboard")
    newest_two = ["checkpoint-0000010", "checkpoint-0000012"]
    assert [c.name for c in checkpoints(out)] == newest_two
    entries = log_of(out)
    assert [(e["step"], e["pictures"]) for e in entries] == [(10, 40), (12, 48)]
    assert all(math.isfinite(e["loss"]) for e in entries)
    assert list(out.rglob("events.out.tfevents*"))
    assert (out / "samples" / "0000012.png").stat().st_size > 10000
    _, _, metadata = load_weights(out)
    assert metadata["model"] == "small" and metadata["pictures_seen"] == 48
    assert metadata["data"]["pictures"] == 12 and metadata["data"]["labelled"] == 18009
    assert not list(out.glob("*.tmp"))


@pytest.mark.slow
def test_the_loss_falls_well_below_that_of_predicting_nothing(pictures, tmp_path):
    """On four scenes, in thirty steps."""
    start(pictures, tmp_path, "--max-steps", 30, "--learning-rate", 2e-3, "--warmup-steps", 5)
    losses = [entry["loss"] for entry in log_of(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]


def test_every_picture_is_seen_once_per_epoch():
    stream = torch.cat([batch_indices(step, 8, 30, seed=4) for step in range(15)])  # four epochs of 30
    for epoch in stream.split(30):
        assert sorted(epoch.tolist()) == list(range(30))
    assert not torch.equal(stream[:30], stream[30:60])
    assert not torch.equal(stream[:8], batch_indices(0, 8, 30, seed=5))
    fewer_than_a_batch = batch_indices(0, 50, 7, seed=4)
    assert sorted(fewer_than_a_batch.bincount().tolist()) == [7] * 6 + [8]


@pytest.mark.slow
def test_checkpoints_are_saved_by_the_clock_unless_save_every_names_steps(argv, tmp_path, monkeypatch):
    train.main(argv(tmp_path / "end", "--max-steps", 3))
    monkeypatch.setattr(bookkeeping, "SAVE_EVERY", 0)
    train.main(argv(tmp_path / "all", "--max-steps", 3, "--keep-checkpoints", 3))
    train.main(argv(tmp_path / "two", "--max-steps", 3, "--log-every", 2))
    assert [c.name for c in checkpoints(tmp_path / "end")] == ["checkpoint-0000003"]
    assert len(checkpoints(tmp_path / "all")) == 3
    assert [c.name for c in checkpoints(tmp_path / "two")] == ["checkpoint-0000002", "checkpoint-0000003"]
    assert [entry["step"] for entry in log_of(tmp_path / "two")] == [2, 3]


def test_min_snr_weighs_an_error_of_the_picture_alike_whatever_is_predicted():
    """As in section 3.4 of the paper: min(SNR, gamma) times the squared error of the clean picture."""
    generator = torch.Generator().manual_seed(0)
    clean, wrong, noisy = torch.randn(3, 5, 3, 8, 8, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([5, 100, 300, 600, 900])
    noise_scheduler = build("small")[1]
    alpha_bar = noise_scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    expected = snr.clamp(max=5) * (clean - wrong).square().mean((1, 2, 3))
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        noise_scheduler.register_to_config(prediction_type=prediction_type)
        targets = []
        for picture in (clean, wrong):  # that the same noisy picture is taken to come from
            noise = (noisy - alpha_bar.sqrt() * picture) / (1 - alpha_bar).sqrt()
            targets.append(target_of(noise_scheduler, picture, noise, timesteps))
        weights = train.loss_weights(noise_scheduler, timesteps, 5.0)
        found = weights * (targets[0] - targets[1]).square().mean((1, 2, 3))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert torch.equal(train.loss_weights(noise_scheduler, timesteps, 0.0), torch.ones(5))


@pytest.mark.slow
def test_min_snr_every_prediction_and_schedule_are_trained_and_kept(pictures, tmp_path):
    schedules = [("epsilon", "squaredcos_cap_v2"), ("v_prediction", "linear"), ("sample", "squaredcos_cap_v2")]
    for prediction_type, beta_schedule in schedules:
        losses = []
        for gamma in (0, 5):
            run = tmp_path / f"{prediction_type}-{gamma}"
            schedule = ["--prediction-type", prediction_type, "--beta-schedule", beta_schedule]
            start(pictures, run, "--max-steps", 1, "--min-snr-gamma", gamma, *schedule)
            losses.append(log_of(run)[0]["loss"])
            _, noise_scheduler, metadata = load_weights(run)
            assert noise_scheduler.config.prediction_type == metadata["recipe"]["prediction_type"] == prediction_type
            assert noise_scheduler.config.beta_schedule == metadata["recipe"]["beta_schedule"] == beta_schedule
            assert metadata["recipe"]["min_snr_gamma"] == gamma
        assert losses[1] != losses[0] > 0


@pytest.mark.slow
def test_weights_are_trained_further_only_with_their_own_schedule(pictures, tmp_path, refused):
    options = ["--max-steps", 1, "--prediction-type", "epsilon"]
    start(pictures, tmp_path / "a", *options)
    argv = [*TINY, "--data", pictures, "--init", tmp_path / "a", "--out", tmp_path / "b", "--max-steps", 1]
    refused(train.main, argv, tmp_path / "a", "epsilon")
    assert not (tmp_path / "b").exists()
    start(pictures, tmp_path / "b", *options, "--init", tmp_path / "a")


@pytest.mark.slow
def test_a_run_from_before_an_option_goes_on_with_what_it_did(argv, tmp_path):
    train.main(argv(tmp_path, "--max-steps", 3, "--save-every", 2, "--lr-schedule", "constant"))
    shutil.rmtree(tmp_path / "checkpoint-0000003")
    path = tmp_path / "checkpoint-0000002" / "metadata.json"
    metadata = json.loads(path.read_text())
    for name in ("prediction_type", "beta_schedule", "min_snr_gamma"):
        del metadata["recipe"][name]
    path.write_text(json.dumps(metadata))
    train.main(argv(tmp_path, "--max-steps", 3, "--save-every", 2, "--lr-schedule", "constant"))
    assert steps_done(tmp_path) == 3


@pytest.mark.slow
def test_accuracy_is_logged_and_drawn_while_training(argv, tmp_path):
    """It is that of sample.py with the same weights. The first checkpoint is written before a step is logged."""
    run = tmp_path / "run"
    options = ["--eval-every", 2, "--save-every", 2, "--log-every", 3, "--mixed-precision", "no"]
    train.main(argv(run, "--max-steps", 3, *options))
    assert [line["step"] for line in log_of(run) if "loss" in line] == [3]
    scores = [line for line in log_of(run) if "accuracy" in line]
    assert [line["step"] for line in scores] == [2, 3]
    sampling = ["--mode", "validation", "--weights", str(run), "--mixed-precision", "no"]
    sample.main([*sampling, "--out", str(tmp_path / "images")])
    report = load_json(tmp_path / "images" / "validation.json")
    assert scores[-1]["accuracy"] == pytest.approx(report["accuracy"], abs=0.02)  # rounding may change a picture
    assert scores[-1]["exact_set"] == pytest.approx(report["exact_set"], abs=0.02)
    with Image.open(run / "curves.png") as image:
        image.load()
        assert min(image.size) > 300


@pytest.mark.slow
def test_the_triples_that_were_not_seen_are_stored(pictures, tmp_path):
    start(pictures, tmp_path / "a", "--max-steps", 1)
    start(pictures, tmp_path / "b", "--max-steps", 1, "--init", tmp_path / "a")
    unseen = [load_weights(tmp_path / name)[2]["unseen"] for name in ("a", "b")]
    seen = {frozenset(c) for c in json.loads((ROOT / "train.json").read_text()).values()}
    assert len(unseen[0]) == 100 and unseen[0] == unseen[1]
    assert not seen & set(map(frozenset, unseen[0]))


# ---------------------------------------------------------------------------- the same weights in another way

# By AdamW: Muon works in bf16, in which the order of a sum shows.
EXACT = ["--optimizer", "adamw", "--learning-rate", 1e-4, "--warmup-steps", 0]


def weights(run: Path, file: str) -> torch.Tensor:
    """All weights, in a row, that the newest checkpoint of a run has in a file of this name."""
    found = tensors(checkpoints(run)[-1])
    names = build("small")[0].state_dict()
    return torch.cat([found[f"{file}.safetensors {name}"].flatten() for name in names])


@pytest.mark.slow
def test_two_processes_train_what_one_does(pictures, tmp_path, run_warm):
    """With averaged weights and label dropout; after 20 steps only rounding differs. `accelerate launch` is
    in test_signals.py."""
    recipe = [*EXACT, "--label-dropout", 0.3, "--max-steps", 20]
    start(pictures, tmp_path / "one", *recipe)
    options = [*TINY, "--data", pictures, *recipe, "--out", tmp_path / "two"]
    process = run_warm(ROOT, *TORCHRUN, "train.py", *options)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "setup: cpu, 2 processes, fp32" in process.stdout

    torch.manual_seed(0)  # as train.py does: the weights that both began with
    initial = torch.cat([tensor.flatten() for tensor in build("small")[0].state_dict().values()])
    for file in ("diffusion_pytorch_model", "model"):  # averaged weights, weights
        one = weights(tmp_path / "one", file)
        two = weights(tmp_path / "two", file)
        assert (one - two).norm() < 1e-3 * (one - initial).norm()


@pytest.mark.slow
def test_half_the_batch_twice_is_the_same_as_the_batch(pictures, tmp_path):
    """2 x 16 against 1 x 32."""
    start(pictures, tmp_path / "whole", *EXACT, "--max-steps", 2, "--batch-size", 32)
    start(pictures, tmp_path / "halves", *EXACT, "--max-steps", 2, "--batch-size", 16, "--grad-accum", 2)
    file = Path("checkpoint-0000002", "training", "model.safetensors")
    whole = load_file(tmp_path / "whole" / file)
    halves = load_file(tmp_path / "halves" / file)
    torch.testing.assert_close(whole, halves, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_processes_that_accelerate_does_not_start_are_told(tmp_path, run_warm):
    """Without MPI it starts one process on CPUs."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2]
    process = run_warm(ROOT, *launch, "train.py", *TINY, "--out", tmp_path / "run")
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert "error: accelerate launch --cpu starts a single process" in process.stderr
    assert "torchrun --nproc_per_node N" in process.stderr


# ---------------------------------------------------------------------------------------- what it starts from


@pytest.mark.slow
def test_init_starts_from_weights(pictures, tmp_path):
    start(pictures, tmp_path / "a", "--max-steps", 2)
    start(pictures, tmp_path / "b", "--max-steps", 1, "--learning-rate", 0, "--init", tmp_path / "a")
    before = load_file(checkpoints(tmp_path / "a")[-1] / checkpoint.WEIGHTS_NAME)
    after = load_file(checkpoints(tmp_path / "b")[-1] / checkpoint.WEIGHTS_NAME)
    assert all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.slow
def test_init_takes_the_network_of_the_weights_and_wants_their_model(pictures, tmp_path, refused):
    """The weights that ship have two layers a block, the preset has one."""
    start(pictures, tmp_path / "run", "--max-steps", 1, "--init", SHIPPED)
    trained = load_json(checkpoints(tmp_path / "run")[-1] / checkpoint.NETWORK_NAME)
    shipped = load_json(SHIPPED / checkpoint.NETWORK_NAME)
    assert trained["layers_per_block"] == shipped["layers_per_block"] == 2
    tiny = ["--model", "tiny-mixed", "--data", pictures, "--out", tmp_path / "tiny", "--init", SHIPPED]
    refused(train.main, tiny, "weights of --model small, not of tiny-mixed")
    assert not (tmp_path / "tiny").exists()


@pytest.mark.slow
def test_a_part_of_the_pictures_is_not_taken_silently(pictures, tmp_path, capsys, monkeypatch, refused, tried):
    """`python -m data.render --limit 4` leaves a folder that train.py would prefer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "iclevr").symlink_to(pictures)
    refused(train.main, [*TINY, "--max-steps", 2], "iclevr: only 12 of 18,009 pictures", "--data iclevr")
    assert [path.name for path in tmp_path.iterdir()] == ["iclevr"]
    train.main([*TINY, "--max-steps", "2", "--data", "iclevr", "--dry-run"])
    assert "iclevr: 12 of 18,009 pictures" in capsys.readouterr().out
    tried("a part of the pictures in iclevr/", "exit 2: iclevr: only 12 of 18,009 pictures are rendered; ...")


@pytest.mark.slow
def test_without_pictures_the_pack_is_trained_on(tmp_path, run_warm):
    process = run_warm(tmp_path, ROOT / "train.py", *TINY, "--max-steps", 2)
    assert process.returncode == 0, process.stderr
    assert "iclevr.npz: 18,009 pictures" in process.stdout


# ----------------------------------------------------------------------------------------------- what it says


@pytest.mark.slow
def test_a_dry_run_and_one_without_pictures_write_nothing(pictures, tmp_path, capsys, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "tiny-mixed", "--data", pictures, "--max-steps", 50, "--mixed-precision", "no"]
    train.main([*map(str, argv), "--dry-run"])
    out = capsys.readouterr().out
    assert "no CUDA: 50 steps will take about" in out and "--model small" in out
    assert "setup: cpu, fp32 (asked for), contiguous_format (" in out and "not compiled (" in out
    refused(train.main, ["--model", "small", "--data", "iclevr"], "iclevr", "python -m data.render")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_time_left_is_that_of_the_steps_left(pictures, tmp_path, capsys):
    common = ("--lr-schedule", "constant", "--max-steps")
    start(pictures, tmp_path / "run", *common, 2)
    assert "no CUDA: 2 steps will take about" in capsys.readouterr().out
    start(pictures, tmp_path / "run", *common, 5)
    assert "no CUDA: 3 steps will take about" in capsys.readouterr().out
