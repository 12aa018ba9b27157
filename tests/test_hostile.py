"""Input that is broken, or made to hurt, through the real entry points: one line that names file and entry,
exit code 2, and not a file more than before."""

import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from conftest import METADATA, NAMES, ROOT, TRAIN, listing
from conftest import TINY_NETWORK as TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import evaluator
import sample
import train
from dataset import read_picture
from infra.commands import InputError
from labels import load_conditions, load_labels, load_objects
from model import build, load_network, load_noise_scheduler
from report import __main__ as report
from report import metrics

OBJECTS = load_objects()
WEIGHTS, CONFIG = checkpoint.WEIGHTS_NAME, checkpoint.NETWORK_NAME
SCHEDULER, TENSOR = checkpoint.SCHEDULER_NAME, "class_embedding.weight"


class Code:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("the_code_has_run", "w")


PACK = f"--model small --labels {ROOT / 'train.json'} --data pack.npz --out new"
OPTIMIZER = "run/checkpoint-0000002/training/optimizer.safetensors"
SCRIPTS = {
    "train": (train.main, TRAIN),
    "resume": (train.main, TRAIN + " --max-steps 2"),
    "train.npz": (train.main, PACK),
    "sample": (sample.main, "--mode list.json --weights weights --evaluator evaluator.pth"),
    "unseen": (sample.main, "--mode unseen --weights weights --evaluator evaluator.pth"),
    "evaluator": (evaluator.main, "pictures --labels list.json --weights evaluator.pth"),
    "metrics": (metrics.main, "images/list"),
    "report": (report.main, "images"),
    "checkpoint": (checkpoint.main, "weights shipped"),
}

# --------------------------------------------------------------------------------------- ways to spoil a file


def text(path: str, content: str):
    return lambda: Path(path).write_bytes(content.encode("utf-8", "surrogateescape"))


def cut(path: str, share=0.5):
    def spoil():
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: int(share * len(content))])

    return spoil


def edit(path: str, **changes):
    """Change entries of a JSON file; None removes one."""

    def spoil():
        content = json.loads(Path(path).read_text()) | changes
        Path(path).write_text(json.dumps({k: v for k, v in content.items() if v is not None or k in "model"}))

    return spoil


def labels(**changes):
    return edit("labels.json", **changes)


def label(condition):
    return edit("labels.json", **{NAMES[3]: condition})


def conditions(condition):
    return text("list.json", json.dumps([["red cube"], condition]))


def picture(make):
    """Spoil the fifth picture: `make` is given its path, which is free."""

    def spoil():
        path = Path("pictures", NAMES[4])
        path.unlink()
        make(path)

    return spoil


def image(mode: str, kind="png", **more):
    return picture(lambda path: Image.new(mode, (64, 64)).save(path, kind, **more))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tensors(change, path="weights/" + WEIGHTS):
    def spoil():
        content = load_file(path)
        content = {name: tensor.clone() for name, tensor in content.items()}
        change(content)
        save_file(content, path)

    return spoil


def header(change, path="weights/" + WEIGHTS):
    """Change what a safetensors file says of itself."""

    def spoil():
        content = Path(path).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        told = json.loads(content[8 : 8 + size])
        change(told)
        told = json.dumps(told).encode()
        Path(path).write_bytes(struct.pack("<Q", len(told)) + told + content[8 + size :])

    return spoil


def pack(**members):
    """A pack with these arrays in place of its own."""

    def spoil():
        with np.load("pack.npz") as file:
            arrays = {"differences": np.zeros((1, 3, 64, 64, 3), np.uint8), "manifest": file["manifest"]}
        np.savez_compressed("pack.npz", **(arrays | members))

    return spoil


def manifest(**changes) -> np.ndarray:
    with np.load(ROOT / "data" / "held_out.npz") as file:
        return np.array(json.dumps(json.loads(str(file["manifest"])) | changes))


def judge(change):
    """Change what the evaluator's checkpoint holds."""

    def spoil():
        content = change(torch.load("evaluator.pth", weights_only=True))
        torch.save(content, "evaluator.pth")

    return spoil


def fill(tensor_name: str, value: float):
    def change(content):
        content["model"][tensor_name][0] = value
        return content

    return change


def link(path: str, to: str):
    def spoil():
        shutil.rmtree(path)
        os.symlink(to, path)

    return spoil


CASES = [  # the fault, the script that meets it, what spoils the good folder, words that the line must hold
    # label files
    ("labels: cut off", "train", cut("labels.json"), "labels.json: not valid JSON at character"),
    ("labels: empty", "train", text("labels.json", ""), "labels.json: not valid JSON at character 0 of 0"),
    ("labels: not UTF-8", "train", text("labels.json", '{"a\udc80'), "labels.json: not a valid JSON file"),
    ("labels: a key twice", "train", text("labels.json", '{"a_0.png": [], "a_0.png": []}'),
     "'a_0.png' stands there twice"),
    ("labels: NaN", "train", text("labels.json", '{"a_0.png": [NaN]}'), "NaN is no finite number"),
    ("labels: an infinite number", "train", text("labels.json", '{"a_0.png": 1e999}'),
     "1e999 is no finite number"),
    ("labels: a list on top", "train", text("labels.json", '[["red cube"]]'),
     "expected a mapping of file names"),
    ("labels: no entry", "train", text("labels.json", "{}"), "expected a mapping of file names"),
    ("labels: nested 100,000 deep", "train", text("labels.json", "[" * 100_000), "not a valid JSON file"),
    ("labels: a number of 100,000 digits", "train", text("labels.json", "1" * 100_000),
     "not a valid JSON file"),
    ("labels: 30 objects in a condition", "train", label([*OBJECTS, *list(OBJECTS)[:6]]),
     f"'{NAMES[3]}': expected a list of 1 to 5"),
    ("labels: numbers for names", "train", label([3, 4]), f"'{NAMES[3]}': unknown object 3"),
    ("labels: a list for a name", "train", label([["red cube"]]),
     f"'{NAMES[3]}': unknown object ['red cube']"),
    ("labels: an unknown object", "train", label(["red cube", "mauve cube"]), "unknown object 'mauve cube'"),
    ("labels: an object twice", "train", label(["red cube"] * 2),
     f"'{NAMES[3]}': 'red cube' stands there twice"),
    ("labels: a name of a megabyte", "train", label(["x" * 2**20]), f"'{NAMES[3]}': unknown object 'xxx"),
    ("labels: half a surrogate", "train", label(["\ud800"]), f"'{NAMES[3]}': unknown object"),
    ("labels: no condition", "train", label([]), f"'{NAMES[3]}': expected a list of 1 to 5"),
    ("labels: a file name with ../", "train", labels(**{"../a_0.png": ["red cube"]}),
     "entry '../a_0.png': expected a file name like"),
    ("labels: a file name from /", "train", labels(**{"/etc/a_0.png": ["red cube"]}),
     "entry '/etc/a_0.png': expected a file name"),
    ("labels: a file name of 5,000 letters", "train", labels(**{"a" * 5000 + "_0.png": ["red cube"]}),
     "labels.json, entry 'aaa"),
    ("labels: a file name without a step", "train", labels(**{"a.png": ["red cube"]}), "entry 'a.png': exp"),
    ("labels: a JPEG", "train", labels(**{"a_0.jpg": ["red cube"]}), "entry 'a_0.jpg': expected a file name"),
    ("labels: not there", "train", lambda: os.unlink("labels.json"), "labels.json: no such file"),
    ("labels: a folder", "train", lambda: (os.unlink("labels.json"), os.mkdir("labels.json")),
     "labels.json: Is a directory"),
    ("conditions: cut off", "sample", cut("list.json"), "list.json: not valid JSON at character"),
    ("conditions: a number on top", "sample", text("list.json", "3"), "list.json: expected a list of lists"),
    ("conditions: 30 objects", "sample", conditions([*OBJECTS, *list(OBJECTS)[:6]]),
     "list.json, entry 1: expected a list of 1 to 5"),
    ("conditions: a string for a list", "sample", conditions("red cube"),
     "list.json, entry 1: expected a list of 1 to 5"),
    ("conditions: null for a name", "sample", conditions([None]), "list.json, entry 1: unknown object None"),
    ("conditions: -Infinity", "sample", text("list.json", "[[-Infinity]]"), "-Infinity is no finite number"),
    # pictures
    ("picture: 0 bytes", "train", picture(Path.touch), f"{NAMES[4]}: not a readable picture"),
    ("picture: cut off", "train", cut(f"pictures/{NAMES[4]}"), f"{NAMES[4]}: not a readable picture"),
    ("picture: text", "train", picture(lambda p: p.write_text("no picture")),
     f"{NAMES[4]}: not a readable picture"),
    ("picture: 100 megapixels in 200 bytes", "train", picture(lambda p: p.write_bytes(png(10_000, 10_000))),
     f"{NAMES[4]}: expected an RGB or RGBA PNG, got one of 10000 x 10000"),
    ("picture: 4 terapixels in 200 bytes", "train", picture(lambda p: p.write_bytes(png(2**21, 2**21))),
     f"{NAMES[4]}: expected an RGB or RGBA PNG, got one of"),
    ("picture: a text of 100 MB in 100 kB", "train",
     picture(lambda p: p.write_bytes(png(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))))),
     f"{NAMES[4]}: not a readable picture"),
    ("picture: animated", "train",
     image("RGB", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")]),
     f"{NAMES[4]}: expected an RGB or RGBA PNG, got one that moves, of 2 frames"),
    ("picture: 16-bit grey", "train", image("I;16"),
     f"{NAMES[4]}: expected an RGB or RGBA PNG, got mode I;16"),
    ("picture: grey", "train", image("L"), f"{NAMES[4]}: expected an RGB or RGBA PNG, got mode L"),
    ("picture: palette", "train", image("P"), f"{NAMES[4]}: expected an RGB or RGBA PNG, got mode P"),
    ("picture: CMYK (a JPEG by another name)", "train", image("CMYK", "jpeg"),
     f"{NAMES[4]}: not a readable picture"),
    ("picture: PostScript, which a decoder would run", "train",
     picture(lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")),
     f"{NAMES[4]}: not a readable picture"),
    ("picture: a link to nowhere", "train", picture(lambda p: p.symlink_to("nowhere")),
     f"{NAMES[4]}: no such picture"),
    ("picture: a link to itself", "train", picture(lambda p: p.symlink_to(p.name)),
     f"{NAMES[4]}: no such picture"),
    ("picture: a pipe, which would wait for ever", "train", picture(os.mkfifo),
     f"{NAMES[4]}: no such picture"),
    ("picture: a folder", "train", picture(Path.mkdir), f"{NAMES[4]}: no such picture"),
    ("pictures: a link to nowhere", "train", link("pictures", "nowhere"), "pictures: no pictures there"),
    ("pictures: a link to itself", "train", link("pictures", "pictures"), "pictures: no pictures there"),
    ("pack: 0 bytes", "train.npz", text("pack.npz", ""), "pack.npz: not a pack"),
    ("pack: cut off", "train.npz", cut("pack.npz"), "pack.npz: not a pack"),
    ("pack: code in an array", "train.npz", pack(manifest=np.array([Code()])), "pack.npz: not a pack"),
    ("pack: a manifest that is none", "train.npz", pack(manifest=np.array("[1")), "pack.npz: not valid JSON"),
    ("pack: a manifest with -1 scenes", "train.npz", pack(manifest=manifest(scenes_done=-1)),
     "pack.npz: not a manifest"),
    ("pack: 100 MB for 3 pictures", "train.npz",
     pack(manifest=manifest(scenes_done=1), differences=np.zeros(10**8, np.uint8)),
     "pack.npz: not a pack made by `python -m data.render --pack` (100,000,128 bytes for 3 pictures)"),
    ("pack: arrays of another shape", "train.npz", pack(differences=np.zeros((2, 2), np.uint8)),
     "expected differences of uint8 [scenes, steps, 64, 64, 3]"),
    ("pack: fewer pictures than told", "train.npz", pack(), "pack.npz: 3 pictures for 2100 of"),
    # weights
    ("weights: a pickle with code in it", "sample",
     lambda: Path("weights", WEIGHTS).write_bytes(pickle.dumps(Code())),
     f"{WEIGHTS}: not a whole safetensors file"),
    ("weights: a header of 2^60 bytes", "sample",
     lambda: Path("weights", WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}"),
     f"{WEIGHTS}: not a whole safetensors file"),
    ("weights: a header that points past the end", "sample",
     header(lambda told: told[TENSOR].update(data_offsets=[0, 10**12])),
     f"{WEIGHTS}: not a whole safetensors file"),
    ("weights: a header with another shape", "sample",
     header(lambda told: told[TENSOR].update(shape=[10**9, 10**9])),
     f"{WEIGHTS}: not a whole safetensors file"),
    ("weights: cut off", "sample", cut("weights/" + WEIGHTS), f"{WEIGHTS}: not a whole safetensors file"),
    ("weights: not there", "sample", lambda: os.unlink("weights/" + WEIGHTS), f"{WEIGHTS}: no such file"),
    ("weights: NaN", "sample", tensors(lambda t: t[TENSOR].fill_(torch.nan)),
     f"{WEIGHTS}, '{TENSOR}': expected finite numbers"),
    ("weights: integers", "sample", tensors(lambda t: t.update({TENSOR: t[TENSOR].int()})),
     f"{WEIGHTS}, '{TENSOR}': expected finite numbers"),
    ("weights: a tensor less", "sample", tensors(lambda t: t.pop(TENSOR)),
     f"{WEIGHTS}: not the weights of this network ('{TENSOR}': expected [128, 24], got none)"),
    ("weights: a tensor more", "sample", tensors(lambda t: t.update(more=torch.ones(1))),
     "('more': expected none, got [1])"),
    ("weights: those of another preset", "sample",
     lambda: save_file(build("tiny-mixed")[0].state_dict(), "weights/" + WEIGHTS),
     f"{WEIGHTS}: not the weights of this network"),
    ("network: 10^12 channels", "sample", edit("weights/" + CONFIG, block_out_channels=[10**12, 10**12]),
     f"{CONFIG}, block_out_channels: expected one like"),
    ("network: 4,096 layers a block", "sample", edit("weights/" + CONFIG, layers_per_block=4096),
     f"{CONFIG}, layers_per_block: expected up to 16"),
    ("network: channels that nothing divides", "sample",
     edit("weights/" + CONFIG, block_out_channels=[33, 33]), f"{CONFIG}: no network"),
    ("network: blocks that there are not", "sample",
     edit("weights/" + CONFIG, down_block_types=["os.system"] * 2), f"{CONFIG}: no network"),
    ("network: patches of 3", "sample", edit("weights/" + CONFIG, patch_size=3), f"{CONFIG}: no network"),
    ("network: deeper than pictures are wide", "sample", edit("weights/" + CONFIG, patch_size=64),
     f"{CONFIG}: no network"),
    ("network: an option that there is not", "sample", edit("weights/" + CONFIG, custom_code="x"),
     f"{CONFIG}, entry 'custom_code': no argument"),
    ("network: a string for a number", "sample", edit("weights/" + CONFIG, layers_per_block="1"),
     f"{CONFIG}, layers_per_block: expected one like 2, got '1'"),
    ("network: cut off", "sample", cut("weights/" + CONFIG), f"{CONFIG}: not valid JSON"),
    ("schedule: 10^12 timesteps", "sample", edit("weights/" + SCHEDULER, num_train_timesteps=10**12),
     f"{SCHEDULER}, num_train_timesteps: expected"),
    ("schedule: 3 timesteps", "sample", edit("weights/" + SCHEDULER, num_train_timesteps=3),
     f"{SCHEDULER}, num_train_timesteps: expected 1000"),
    ("schedule: a prediction that we do not know", "sample",
     edit("weights/" + SCHEDULER, prediction_type="sample"),
     f"{SCHEDULER}, prediction_type: expected epsilon or"),
    ("schedule: betas that there are not", "sample", edit("weights/" + SCHEDULER, beta_schedule="x"),
     f"{SCHEDULER}: no noise schedule"),
    ("schedule: beta of 10^6", "sample", edit("weights/" + SCHEDULER, beta_end=1e6),
     f"{SCHEDULER}, beta_end: expected one like"),
    ("metadata: not there", "sample", lambda: os.unlink("weights/metadata.json"),
     "weights/metadata.json: no such file"),
    ("metadata: a list", "sample", text("weights/metadata.json", "[]"),
     "weights/metadata.json, model: expected str"),
    ("metadata: of no model", "sample", edit("weights/metadata.json", model="x"),
     "metadata.json, model: expected one of reference"),
    ("metadata: -1 pictures", "sample", edit("weights/metadata.json", pictures_seen=-1),
     "metadata.json, pictures_seen: expected int, got -1"),
    ("metadata: 10^12 sampling steps", "sample",
     edit("weights/metadata.json", sampling=METADATA["sampling"] | {"steps": 10**12}),
     "metadata.json, sampling, 'steps': expected a number from 1 to 1000"),
    ("metadata: a sampler that there is not", "sample",
     edit("weights/metadata.json", sampling=METADATA["sampling"] | {"sampler": []}),
     "sampling, 'sampler': expected one of ddpm"),
    ("metadata: a sampling option that there is not", "sample",
     edit("weights/metadata.json", sampling=METADATA["sampling"] | {"x": 1}),
     "sampling, 'x': no option of sampling"),
    ("metadata: an interval of words", "sample",
     edit("weights/metadata.json", sampling=METADATA["sampling"] | {"guidance_interval": ["a", "b"]}),
     "'guidance_interval': expected two numbers"),
    ("metadata: unseen triples of unknown objects", "unseen",
     edit("weights/metadata.json", unseen=[["red cone"]]),
     "weights, unseen, entry 0: unknown object 'red cone'"),
    ("weights: a file in place of the folder", "sample",
     lambda: (shutil.rmtree("weights"), Path("weights").touch()), "weights/metadata.json: Not a directory"),
    ("--init: weights of another preset", "train", edit("weights/metadata.json", model="tiny-mixed"),
     "weights: weights of --model tiny-mixed, not of small"),
    ("--out: a file", "train", lambda: (shutil.rmtree("run"), Path("run").touch()), "run: File exists"),
    ("to ship: weights that are not there", "checkpoint", lambda: shutil.rmtree("weights"),
     "weights/metadata.json: no such file"),
    # runs
    ("run: optimizer cut off", "resume", cut(OPTIMIZER),
     "optimizer.safetensors: not a whole safetensors file"),
    ("run: optimizer of another network", "resume",
     lambda: save_file({"0.exp_avg": torch.ones(3)}, OPTIMIZER),
     "optimizer.safetensors, '0.exp_avg': not of an optimizer of this network"),
    ("run: optimizer of parameter 10^9", "resume",
     lambda: save_file({"1000000000.x": torch.ones(3)}, OPTIMIZER),
     "optimizer.safetensors, '1000000000.x': not of an optimizer"),
    ("run: an optimizer of nothing", "resume",
     lambda: save_file({}, OPTIMIZER),
     "optimizer.safetensors: nothing of parameter 0"),
    ("run: NaN in its weights", "resume",
     tensors(lambda t: t[TENSOR].fill_(torch.nan), "run/checkpoint-0000002/training/model.safetensors"),
     "without run/checkpoint-0000002 the run goes on from an earlier one"),
    ("run: words for losses", "resume", edit("run/checkpoint-0000002/metadata.json", losses=["x"]),
     "metadata.json, losses: expected numbers"),
    # evaluators
    ("evaluator: a pickle with code in it", "sample",
     lambda: Path("evaluator.pth").write_bytes(pickle.dumps(Code())),
     "evaluator.pth: not a checkpoint of tensors"),
    ("evaluator: code beside its tensors", "sample", judge(lambda c: c | {"more": Code()}),
     "evaluator.pth: not a checkpoint of tensors"),
    ("evaluator: cut off", "evaluator", cut("evaluator.pth"), "evaluator.pth: not a checkpoint of tensors"),
    ("evaluator: 0 bytes", "evaluator", text("evaluator.pth", ""),
     "evaluator.pth: not a checkpoint of tensors"),
    ("evaluator: a list", "evaluator", judge(lambda c: [c]), "evaluator.pth: expected a ResNet18"),
    ("evaluator: numbers for tensors", "evaluator", judge(lambda c: {"model": {"fc.0.weight": 3}}),
     "evaluator.pth: expected a ResNet18"),
    ("evaluator: a threshold of words", "evaluator", judge(lambda c: c | {"threshold": "x"}),
     "evaluator.pth, threshold: expected"),
    ("evaluator: NaN", "evaluator", judge(fill("fc.0.weight", torch.nan)),
     "evaluator.pth, model: expected finite numbers"),
    # what sample.py leaves
    ("report: of 10^12 pictures", "metrics", edit("images/list.json", num_images=10**12),
     "list/999999999999.png: no such picture"),
    ("report: of a list that was not finished", "metrics", edit("images/list.json", accuracies=None),
     "list.json: expected the report that sample.py writes"),
    ("report: conditions of numbers", "metrics", edit("images/list.json", conditions=[[1]]),
     "list.json, conditions, entry 0: unknown object 1"),
    ("report: a sampler that there is not", "report", edit("images/list.json", sampler="x"),
     "list.json, 'sampler': expected one of"),
    ("report: a number for the weights' name", "report", edit("images/list.json", weights=3),
     "list.json, weights: expected str, got 3"),
    ("report: words for accuracies", "report", edit("images/list.json", accuracies=["x"]),
     "list.json: expected conditions"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "script", "spoil", "words"), CASES, ids=[case[0] for case in CASES])
def test_spoilt_input(there, tmp_path, tried, fault, script, spoil, words):
    """In a process of its own, so that all counts which Python and the libraries print."""
    main, argv = SCRIPTS[script]
    spoil()
    before = listing(there)
    process = children.start(main.__module__, argv.split(), tmp_path, there)
    code, lines = children.finish(process), (tmp_path / "stderr").read_text().splitlines()
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and words in lines[0] and len(lines[0]) < 500, lines[0]
    assert listing(there) == before
    said = lines[0].removeprefix("error: ").replace(str(there) + "/", "").replace(str(ROOT) + "/", "")
    tried(fault, f"exit 2: {said[:160].replace('|', '/')}{'...' if len(said) > 160 else ''}")


def test_there_are_enough_of_them():
    assert len(CASES) >= 40 and len({case[0] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("fault", ["labels: a key twice", "weights: a pickle with code in it"])
def test_spoilt_input_of_a_command(there, run, fault):
    [(_, script, spoil, words)] = [case for case in CASES if case[0] == fault]
    main, argv = SCRIPTS[script]
    spoil()
    process = run(there, ROOT / f"{main.__module__}.py", *argv.split())
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    assert words in process.stderr and not Path("the_code_has_run").exists()


def test_object_files_without_colours_are_refused(clone, run):
    """The lab's objects.json drops in, and so may another."""
    (clone / "objects.json").write_text(json.dumps({f"object{i}": i for i in range(24)}))
    process = run(clone, "sample.py", "--mode", "test")
    assert process.returncode == 2
    assert process.stderr.endswith("objects.json, entry 'object0': expected a colour and a shape\n")
    (clone / "objects.json").write_text(json.dumps(OBJECTS | {"gray cube": 1}))
    with pytest.raises(
        InputError, match="objects.json: expected 24 names with the indices 0 to 23, each once"
    ):
        load_objects(clone / "objects.json")


def test_the_good_folder_is_good(there, capsys):
    """So that it is the fault which is refused."""
    for name in ("train", "sample", "evaluator", "metrics", "checkpoint"):
        main, argv = SCRIPTS[name]
        if name == "train":
            argv += " --max-steps 2"
        if name != "evaluator":  # its pictures are not numbered
            main(argv.split())


def test_sixteen_bits_become_eight(tmp_path):
    """As Pillow reads them: the high byte of each."""
    rows = b"".join(b"\0" + struct.pack(">6H", 0x1234, 0xABCD, 0xFF00, 0, 255, 256) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(content)
    assert read_picture(tmp_path / "a.png")[:, 0, 0].tolist() == [0x12, 0xAB, 0xFF]


# ---------------------------------------------------------------------------------------------------- fuzzing

names = st.sampled_from([*OBJECTS, "red cone", "", "\ud800"]) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | names
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=6) | st.dictionaries(names, x, max_size=4), max_leaves=12
)
filenames = (
    st.sampled_from(NAMES) | st.text(max_size=12) | st.from_regex(r"[\w./-]{1,8}_\d\.png", fullmatch=True)
)
likely_labels = st.dictionaries(filenames, st.lists(names, max_size=6) | values, max_size=4)
fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(path: Path, value) -> Path:
    content = value if isinstance(value, bytes) else json.dumps(value).encode("utf-8", "surrogatepass")
    path.write_bytes(content)
    return path


@fuzz
@given(value=likely_labels | values | st.binary(max_size=60))
def test_any_label_file_is_read_or_refused(tmp_path_factory, value):
    path = written(tmp_path_factory.getbasetemp() / "labels.json", value)
    for load in (load_labels, load_conditions):
        try:
            found = load(path, OBJECTS)
        except InputError as error:
            assert str(error).startswith(f"{path}") and len(str(error).splitlines()) == 1
            continue
        for condition in found.values() if isinstance(found, dict) else found:
            assert 1 <= len(condition) <= 5 and set(condition) <= OBJECTS.keys()
        assert all("/" not in filename for filename in found if isinstance(found, dict))


@fuzz
@given(value=st.dictionaries(names, st.integers(-1, 25) | values, max_size=25) | values)
def test_any_object_file_is_read_or_refused(tmp_path_factory, value):
    path = written(tmp_path_factory.getbasetemp() / "objects.json", value)
    try:
        assert sorted(load_objects(path).values()) == list(range(24))
    except InputError as error:
        assert str(error).startswith(f"{path}")


options = ["block_out_channels", "down_block_types", "up_block_types"]
options += ["layers_per_block", "attention_head_dim", "dropout", "patch_size", "resnet_time_scale_shift", "x"]
blocks = st.sampled_from(
    ["DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D", "SkipUpBlock2D", "x"]
)
few = st.integers(-1, 70) | st.sampled_from([0, 1, 2, 32, 64, 96, 128, 4096, 10**12])
likely = few | st.lists(few, max_size=3) | st.lists(blocks, max_size=3) | blocks | st.floats() | values


@fuzz
@given(changes=st.dictionaries(st.sampled_from(options), likely, max_size=3))
def test_any_network_file_is_read_or_refused(tmp_path_factory, changes):
    """Without the memory that it asks for; what is read works."""
    path = written(tmp_path_factory.getbasetemp() / "config.json", TINY | changes)
    try:
        model = load_network(path)
    except InputError as error:
        assert str(error).startswith(f"{path}")
        return
    assert all(parameter.is_meta for parameter in model.parameters())


schedules = [
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
]
schedules += ["clip_sample", "timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "_class_name", "x"]


@fuzz
@given(
    changes=st.dictionaries(st.sampled_from(schedules), st.sampled_from([1000, "linear", "epsilon"]) | values)
)
def test_any_schedule_file_is_read_or_refused(tmp_path_factory, changes):
    path = written(tmp_path_factory.getbasetemp() / "schedule.json", changes)
    try:
        scheduler = load_noise_scheduler(path)
    except InputError as error:
        assert str(error).startswith(f"{path}")
        return
    assert len(scheduler.alphas_cumprod) == 1000


@fuzz
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    end=st.integers(0, 10**6),
)
def test_any_picture_is_read_or_refused(pictures, tmp_path_factory, changes, end):
    content = bytearray((pictures / NAMES[0]).read_bytes())
    for place, byte in changes:
        content[place % len(content)] = byte
    path = written(tmp_path_factory.getbasetemp() / "a.png", bytes(content[: end % len(content) + 1]))
    try:
        assert read_picture(path).shape == (3, 64, 64)
    except InputError as error:
        assert str(error).startswith(f"{path}")
