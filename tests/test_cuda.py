"""The CUDA path on a device that is not there (fakecuda.py): it runs to its end, waits for the device no more
than it must, and compiles for few shapes."""

import json
import shutil
import subprocess
import sys

import pytest

import fakecuda
from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")]
SCRIPT = ROOT / "tests" / "on_fake_cuda.py"


@pytest.fixture(scope="module")
def scenarios(pictures, tmp_path_factory):
    """What on_fake_cuda.py found on two GPUs: name of a run -> what it printed, steps, what was compiled."""
    processes = {}
    for gpu in (("NVIDIA H100 80GB HBM3", 9, 0), ("Tesla T4", 7, 5)):  # one on each core
        folder = tmp_path_factory.mktemp("gpu")
        with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
            command = [sys.executable, SCRIPT, *map(str, gpu), pictures]
            env = fakecuda.environment(folder) | {"OMP_NUM_THREADS": "1"}
            processes[folder] = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err)
    found = []
    for folder, process in processes.items():
        assert process.wait(600) == 0, (folder / "stderr").read_text()[-3000:]
        result = json.loads((folder / "stdout").read_text().splitlines()[-1])
        found.append(result | {"folder": folder})
    return found


@pytest.fixture
def h100(scenarios):
    return scenarios[0]


@pytest.fixture
def t4(scenarios):
    return scenarios[1]


def waits(found: dict, step: int) -> dict:
    """The waits of a step; from the second on nothing is new."""
    return found["steps"][step]["waits"]


@pytest.mark.parametrize("model", ["small", "tiny-mixed"])
def test_a_run_saves_and_goes_on(h100, model):
    first = h100[f"train {model}"]
    second = h100[f"resume {model}"]
    assert first["code"] == second["code"] == 0
    assert f"runs/{model}: trained to step 3" in first["stdout"]
    assert f"runs/{model}: goes on at step 3 of 5" in second["stdout"]
    assert "setup: cuda, bf16 autocast (matrix units), channels_last" in first["stdout"]
    assert [len(found["steps"]) for found in (first, second)] == [3, 2]


def test_weights_that_are_not_averaged_are_written_once(h100):
    for model, files in (("tiny-mixed", ["optimizer"]), ("small", ["model", "optimizer"])):
        saved = sorted((h100["folder"] / "runs" / model).glob("checkpoint-*/training"))[0]
        assert sorted(path.stem for path in saved.iterdir()) == files


def test_a_step_with_adamw_waits_for_nothing(h100):
    """Also after a resume; its numbers are looked at a step later."""
    assert waits(h100["train reference"], 1) == {}
    [copied] = waits(h100["resume tiny-mixed"], 0)  # as in the first step of a run
    assert "noise_scheduler.add_noise" in copied


def test_a_step_with_muon_waits_once(h100):
    """To look at its numbers before the optimizer steps."""
    once = {"an event, device.py: arrived.synchronize()": 1}
    assert waits(h100["train small"], 1) == once
    assert waits(h100["resume small"], 0).items() >= once.items()
    assert sum(waits(h100["resume small"], 0).values()) == 2  # and what the first step of a run copies


def test_a_step_launches_no_more_kernels_than_it_did(h100):
    """Counted when this was written; the table in docs/speed.md has the counts."""
    assert h100["train small"]["steps"][1]["kernels"] <= 1800
    assert h100["train reference"]["steps"][1]["kernels"] <= 2450


def test_a_grid_is_sampled_in_training(h100):
    assert h100["grid"]["code"] == 0
    assert (h100["folder"] / "runs" / "tiny-mixed" / "samples" / "0000006.png").exists()


def shapes(found: dict) -> dict[str, list[int]]:
    """Mode of torch.compile -> the batch sizes that the network was compiled for."""
    compiled = [(mode, images) for mode, images, *labels in found["compiled"] if len(labels) == 2]
    return {mode: [images[0] for other, images in compiled if other == mode] for mode, _ in compiled}


def test_a_training_step_is_a_cuda_graph_unless_gradients_are_added_up(h100):
    assert shapes(h100["compiled training"]) == {"reduce-overhead": [4]}
    assert shapes(h100["compiled training, accumulated"]) == {"default": [4]}


def test_all_lists_are_sampled_in_batches_of_one_size(h100):
    """32 + 32 + 100 pictures and the strip: three batches of 55. Guidance makes a second size."""
    assert shapes(h100["sample tiny-mixed"]) == {"reduce-overhead": [55]}
    assert shapes(h100["sample small"]) == {"reduce-overhead": [55, 110]}
    assert "(9 passes; pays from some 0; the first takes" in h100["sample tiny-mixed"]["stdout"]
    for name, count in (("test", 32), ("new_test", 32), ("unseen", 100)):
        assert len(list((h100["folder"] / "images" / name).glob("*.png"))) == count
    assert (h100["folder"] / "images" / "process.png").exists()


def test_few_passes_are_not_compiled(h100):
    assert h100["sample few"]["compiled"] == []
    assert "not compiled (pays from some 12,000 passes, here 2)" in h100["sample few"]["stdout"]


@pytest.mark.parametrize("how", ["allocator", "driver", "cublas", "cudnn"])
def test_too_little_memory_is_told_in_one_line(h100, how):
    found = {name: h100[name] for name in (f"train: {how}", f"strip: {how}") if name in h100}
    assert found
    for name, result in found.items():
        size = "4; try --batch-size 2 --grad-accum 2, which gives the same result" if "train" in name else "1"
        line = result["stderr"].splitlines()[-1]
        assert result["code"] == 2
        assert line.endswith(f"error: cuda: out of memory with --batch-size {size}")


def test_a_card_for_which_torch_has_no_kernels_is_named(h100):
    for what in ("train", "strip"):
        result = h100[f"{what}: no kernel"]
        line = result["stderr"].splitlines()[-1]
        assert result["code"] == 2
        assert "NVIDIA H100 80GB HBM3: this build of PyTorch (" in line
        assert "has no kernels for a GPU of sm_90, only for sm_80, sm_90; install one that has" in line


def test_cards_without_bf16_take_fp16(t4):
    """With accelerate's gradient scaler, whose state goes on; it looks at Muon's gradients by itself."""
    for name in ("train small", "train tiny-mixed", "resume tiny-mixed", "sample"):
        found = t4[name]
        assert found["code"] == 0
        assert "setup: cuda, fp16 autocast (matrix units; this GPU has no bf16)" in found["stdout"]
    assert "goes on at step 2 of 3" in t4["resume tiny-mixed"]["stdout"]
    last = t4["resume tiny-mixed"]["steps"][0]["waits"]
    assert any("grad_scaler" in where for where in last)  # is saved
    once = {"a number, train.py: accelerated_optimizer.step()": 1}
    assert {w: n for w, n in waits(t4["train small"], 1).items() if "optimizer" in w} == once


def test_the_labs_own_evaluator_scores_in_place_of_ours(t4):
    """All scripts run with it as it is, and its accuracy is what sample.py reports."""
    for name in ("sample", "metrics", "report", "official"):
        assert t4[f"lab: {name}"]["code"] == 0, t4[f"lab: {name}"]["stderr"]
    lines = t4["lab: sample"]["stdout"].splitlines()
    assert lines.count("the lab's accuracy") == 2
    for name in ("test", "new_test"):
        report = json.loads((t4["folder"] / "images" / f"{name}.json").read_text())
        assert report["evaluator"] == "checkpoint.pth" and len(report["accuracies"]) == 1
        assert any(line.startswith(f"accuracy: {report['accuracy']:.4f}, exact set: ") for line in lines)
    scored = t4["lab: metrics"]["stdout"].splitlines()
    assert [line.partition(":")[0] for line in scored] == ["images/test", "images/new_test"]
    assert (t4["folder"] / "images" / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no checkpoint.pth", "error: checkpoint.pth: no such file"),
        ("other weights", "evaluator.pth: the lab's evaluator.py loads checkpoint.pth"),
        ("pickled", "error: checkpoint.pth: not the lab's own file"),
        ("broken", "error: evaluator.py: the lab's own file cannot be loaded (RuntimeError: "),
    ],
)
def test_what_the_labs_evaluator_cannot_load_is_told_in_one_line(t4, name, words):
    found = t4[f"lab: {name}"]
    assert found["code"] == 2
    [line] = [line for line in found["stderr"].splitlines() if line.strip()]
    assert words in line
