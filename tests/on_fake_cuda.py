"""Runs the scripts on a CUDA device that is not there, and prints what happened as JSON, for test_cuda.py.

python tests/on_fake_cuda.py NAME MAJOR MINOR PICTURES      # in an environment of fakecuda.environment
"""

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fakecuda
from fakecuda import Cuda

NAME, MAJOR, MINOR, PICTURES = sys.argv[1:]
fakecuda.install(NAME, int(MAJOR), int(MINOR))
warnings.simplefilter("ignore")  # of tensors without numbers

import torch

import lab
import sample
import scoring
import train
from infra import device
from options import PRESETS
from report import __main__ as report
from report import metrics

# The reference's network, narrower: as many layers, so as many kernels.
PRESETS["reference"]["network"] = {"block_out_channels": (32, 32, 64, 64, 64, 64)}
# By the report's recipe, for what does not depend on the network.
PRESETS["tiny-mixed"]["network"] |= {"block_out_channels": (32, 32, 32), "layers_per_block": 1}
COMPILE_FROM = device.COMPILE_FROM
train.tqdm = fakecuda.Steps


def run(main, *argv, errors=None, compiles=False) -> dict:
    """What `main` did: what it printed, its exit code, and what would have been compiled."""
    device.COMPILE_FROM = 0 if compiles else COMPILE_FROM
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    fakecuda.compiled_for.clear()
    with Cuda(errors), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
    compiled = sorted(set(fakecuda.compiled_for))
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue(), "compiled": compiled}


def training(model: str, steps: int, *more, **options) -> dict:
    fakecuda.Steps.last = None
    argv = ["--model", model, "--data", PICTURES, "--out", f"runs/{model}", "--max-steps", steps]
    argv += ["--batch-size", 4, "--lr-schedule", "constant", "--sample-every", 0, *more]
    found = run(train.main, *argv, **options)
    return found | {"steps": fakecuda.Steps.last.counts if fakecuda.Steps.last else []}


def sampling(model: str, *more, **options) -> dict:
    argv = ["--weights", f"runs/{model}", "--out", "images", "--overwrite"]
    return run(sample.main, *argv, *more, **options)


def on_h100() -> dict:
    found = {}
    found["train reference"] = training("reference", 3)
    for model in ("small", "tiny-mixed"):
        found[f"train {model}"] = training(model, 3)
        found[f"resume {model}"] = training(model, 5)
    found["grid"] = training("tiny-mixed", 6, "--sample-every", 6)
    found["compiled training"] = training("tiny-mixed", 7, compiles=True)
    more = ["--out", "runs/more", "--grad-accum", 2]
    found["compiled training, accumulated"] = training("tiny-mixed", 1, *more, compiles=True)

    lists = ["--mode", "test", "new_test", "unseen", "process", "--steps", 3]
    found["sample tiny-mixed"] = sampling("tiny-mixed", *lists, "--sampler", "ddpm", compiles=True)
    found["sample small"] = sampling("small", *lists, "--seed", 1, compiles=True)
    found["sample few"] = sampling("small", "--mode", "test", "--steps", 2, "--seed", 2)

    convolution = "aten.convolution.default"
    no_kernel = "no kernel image is available for execution"
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    failures = {  # the kernel that fails, and how
        "allocator": ("aten._to_copy.default", torch.OutOfMemoryError("CUDA out of memory.")),
        "driver": (convolution, torch.AcceleratorError("CUDA error: out of memory")),
        "cublas": ("aten.addmm.default", RuntimeError(cublas)),
        "cudnn": (convolution, RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
        "no kernel": (convolution, torch.AcceleratorError(f"CUDA error: {no_kernel} on the device")),
    }
    for name, (kernel, error) in failures.items():
        errors = {kernel: error}
        if name != "cudnn":
            found[f"train: {name}"] = training("small", 2, "--out", "runs/failed", errors=errors)
        if name != "allocator":  # which here fails for the evaluator, before
            found[f"strip: {name}"] = sampling("small", "--mode", "process", "--steps", 2, errors=errors)
    return found


def with_the_labs_evaluator() -> dict:
    """The scripts with a file of the lab's interface in place of ours; for good, so nothing comes after it.

    Ours is kept in ROOT; a folder in which the lab's lies comes first.
    """
    Path("lab").mkdir()
    shutil.copy(ROOT / "tests" / "lab_evaluator.py", "lab/evaluator.py")
    sys.path.insert(0, "lab")
    del sys.modules["evaluator"]  # that was imported to sample before
    state = torch.load(ROOT / "weights" / "evaluator.pth", weights_only=True)["model"]
    state = {name: x.float() if x.is_floating_point() else x for name, x in state.items()}
    painting = ["--mode", "test", "new_test", "--steps", 1, "--seed", 3]
    found = {"lab: no checkpoint.pth": sampling("small", *painting)}
    # As PyTorch takes it only from a file that is known: with more than tensors and plain values in it.
    torch.save({"model": state, "options": argparse.Namespace()}, lab.LAB_CHECKPOINT)
    found["lab: pickled"] = sampling("small", *painting)
    content = lab.LAB_CHECKPOINT.read_bytes()
    official = scoring.OFFICIAL_BLOB
    scoring.OFFICIAL_BLOB = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found["lab: official"] = sampling("small", "--mode", "process", "--steps", 1)
    scoring.OFFICIAL_BLOB = official
    torch.save({"model": {}}, lab.LAB_CHECKPOINT)
    found["lab: broken"] = sampling("small", *painting)
    torch.save({"model": state}, lab.LAB_CHECKPOINT)
    more = ["--evaluator", ROOT / "weights" / "evaluator.pth"]
    found["lab: other weights"] = sampling("small", *painting, *more)
    found["lab: sample"] = sampling("small", *painting)
    found["lab: metrics"] = run(metrics.main, "images/test", "images/new_test")
    # Not with the held-out renders, which are of other labels: to judge them takes long.
    Path("labels.json").write_text(json.dumps({"CLEVR_train_000000_0.png": ["red cube"]}))
    found["lab: report"] = run(report.main, "images", "--labels", "labels.json")
    return found


def on_t4() -> dict:
    found = {
        "train small": training("small", 2),
        "train tiny-mixed": training("tiny-mixed", 2),
        "resume tiny-mixed": training("tiny-mixed", 3),
        "sample": sampling("small", "--mode", "test", "--steps", 3),
    }
    return found | with_the_labs_evaluator()


print(json.dumps(on_h100() if MAJOR == "9" else on_t4()))
