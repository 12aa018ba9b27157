"""What is the user's stays: folders with other things, names with dots, file systems that lack a call."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TRAIN, listing

import checkpoint
import evaluator
import sample
import train
from data import render
from infra import files
from report import __main__ as report
from report import metrics

LISTS = "--weights weights --evaluator evaluator.pth --mode"
COMMANDS = {
    "train": (train.main, TRAIN.replace("--out run", "--out new")),
    "sample": (sample.main, f"{LISTS} list.json --out new"),
    "two lists": (sample.main, f"{LISTS} list.json second/other.json --out new"),
    "strip": (sample.main, f"{LISTS} process --out new"),
    "checkpoint": (checkpoint.main, "weights new"),
    "checkpoint of a run": (checkpoint.main, "run new"),
    "render": (render.main, "--limit 1 --out new"),
    "random scenes": (render.main, "--random-scenes 1 --out new"),
    "evaluator": (evaluator.main, "pictures --labels labels.json --train --epochs 1 --out new/judge.pth"),
    "report": (report.main, "images --out new/page.html"),
}
FOREIGN = [  # the command, a file that stands there, what the line must name
    ("train", "log.jsonl", "new: not empty ('log.jsonl')"),
    ("train", "notes.txt", "new: not empty ('notes.txt')"),
    ("train", "run.json", "new: not empty ('run.json')"),
    ("train", "samples/0001000.png", "new: not empty ('samples')"),
    ("sample", "list/0.png", "new/list: not empty ('0.png')"),
    ("sample", "list/notes.txt", "new/list: not empty ('notes.txt')"),
    ("sample", "list.json", "new/list.json: no report of sample.py"),
    ("sample", "list.png", "new/list.png: there is no report"),
    ("two lists", "other.json", "new/other.json: no report of sample.py"),
    ("strip", "process.png", "new/process.png: there is no report"),
    ("checkpoint", "notes.txt", "new: not empty ('notes.txt')"),
    ("checkpoint", "metadata.json", "new/metadata.json, model: expected str"),
    ("checkpoint of a run", "checkpoint-0000009/notes.txt", "new: not empty"),
    ("render", "notes.txt", "new: holds files that render.py did not make ('notes.txt')"),
    ("random scenes", "notes.txt", "new: holds files that render.py did not make ('notes.txt')"),
    ("evaluator", "judge.pth", "new/judge.pth: there already"),
    ("report", "page.html", "new/page.html: there already"),
]


def whole_listing(folder: Path) -> dict:
    return {path: Path(path).read_bytes() for path in listing(folder) if Path(path).is_file()}


@pytest.mark.parametrize(("command", "name", "words"), FOREIGN, ids=[f"{c}: {n}" for c, n, _ in FOREIGN])
def test_what_is_not_ours_is_left_as_it_is(there, refused, tried, command, name, words):
    (there / "new" / name).parent.mkdir(parents=True)
    (there / "new" / name).write_text('{"mine": 1}')
    (there / "second").mkdir()
    shutil.copy(there / "list.json", there / "second" / "other.json")
    before, contents = listing(there), whole_listing(there)
    main, argv = COMMANDS[command]
    refused(main, argv.split(), words)
    assert listing(there) == before and whole_listing(there) == contents
    tried(f"{command} into a folder with a user's {name}", f"exit 2: {words} ...; the folder is untouched")


def test_weights_to_ship_replace_weights_to_ship_alone(there, refused, tried):
    """Neither a run, nor its checkpoint, nor a folder with something besides; neighbours stay."""
    for name in ("shipped.old", "shipped.tmp", "shipped/unet"):
        (there / name).mkdir(parents=True, exist_ok=True)
        (there / name / "notes.txt").write_text("mine")
    shutil.rmtree(there / "shipped")
    for _ in range(2):
        checkpoint.main(["run", "shipped"])
    assert checkpoint.load_weights(there / "shipped")
    assert all((there / f"shipped.{end}" / "notes.txt").read_text() == "mine" for end in ("old", "tmp"))
    (there / "shipped" / "unet" / "notes.txt").write_text("mine")
    before = listing(there)
    refused(checkpoint.main, ["run", "shipped"], "shipped: holds unet/notes.txt, which would be lost")
    refused(checkpoint.main, ["run", "run"], "run: not empty")
    newest = checkpoint.newest(there / "run")
    refused(checkpoint.main, ["run", newest], "is what would be read")
    refused(checkpoint.main, ["weights", newest], "training", "which would be lost")
    assert listing(there) == before
    tried("weights to ship into a run, a checkpoint or a folder with more in it", "exit 2; nothing is lost")


def test_a_link_to_weights_is_followed(there):
    checkpoint.main(["run", "shipped"])
    (there / "link").symlink_to("shipped")
    before = (there / "shipped" / checkpoint.WEIGHTS_NAME).read_bytes()
    checkpoint.main(["weights", "link"])
    assert (there / "link").is_symlink()
    assert (there / "shipped" / checkpoint.WEIGHTS_NAME).read_bytes() != before


def test_a_pack_replaces_a_pack_alone(pictures, tmp_path, refused):
    labels = tmp_path / "labels.json"
    shutil.copytree(pictures, tmp_path / "set")
    argv = ["--out", tmp_path / "set", "--limit", 4, "--pack"]
    (tmp_path / "set.npz").write_text("mine")
    refused(render.main, argv, "set.npz: there already, and no pack")
    assert (tmp_path / "set.npz").read_text() == "mine" and not labels.exists()
    (tmp_path / "set.npz").unlink()
    (tmp_path / "set.tmp").write_text("mine")
    for _ in range(2):
        render.main(list(map(str, argv)))
    assert (tmp_path / "set.tmp").read_text() == "mine"


def test_a_killed_start_is_no_obstacle(there):
    """A folder with a lock and a temporary file alone counts as empty."""
    for name in ("new", "images2/list"):
        (there / name).mkdir(parents=True)
        (there / name / ".lock").touch()
        (there / name / ".iclevr-ddpm-0123").mkdir()
    train.main([*COMMANDS["train"][1].split(), "--max-steps", "1"])
    sample.main([*f"{LISTS} list.json --out images2".split()])
    assert sorted(p.name for p in (there / "images2" / "list").iterdir()) == ["0.png", "1.png"]


def test_names_with_dots_keep_apart(there, tried, capsys):
    """Each list its own folder, grid and report, also for metrics.py and report.py."""
    lists = {"prompts.v1": [["red cube"]], "prompts.v2": [["green cube"], ["gray sphere"]]}
    lists |= {"test.hard": [["red cube"]]}
    for name, conditions in lists.items():
        (there / f"{name}.json").write_text(json.dumps(conditions))
    sample.main(f"{LISTS} prompts.v1.json prompts.v2.json test.hard.json --out out".split())
    for name, conditions in lists.items():
        found = json.loads((there / "out" / f"{name}.json").read_text())
        assert found["conditions"] == conditions
        assert len(list((there / "out" / name).glob("*.png"))) == len(conditions)
        assert (there / "out" / f"{name}.png").is_file()
    metrics.main(["out/prompts.v1", "out/prompts.v2", "out/test.hard"])
    assert capsys.readouterr().out.count("accuracy") == 6
    assert [f.name for f in report.sample_folders(there / "out")] == list(lists)
    tried("lists named prompts.v1.json and prompts.v2.json", "a folder, a grid and a report for each")


@pytest.mark.parametrize("out", [".", "second"])
def test_a_report_never_overwrites_a_list(there, refused, out):
    (there / "second").mkdir()
    shutil.copy(there / "list.json", there / "second")
    before = listing(there)
    refused(sample.main, [*f"{LISTS} list.json --out".split(), out], "list.json: no report of sample.py")
    assert listing(there) == before


# ----------------------------------------------------------------------------------------------- file systems

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
int fsync(int fd) {
    struct stat found;
    fstat(fd, &found);
    const char *other = getenv("FILES_FAIL_WITH");
    if (S_ISDIR(found.st_mode)) { errno = atoi(getenv("FAIL_WITH")); return -1; }
    if (other) { errno = atoi(other); return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int flock(int fd, int operation) { errno = atoi(getenv("FAIL_WITH")); return -1; }
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> str:
    """A library by which every folder's fsync and every flock fails, as on some file systems."""
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = ["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return str(folder / "shim.so")


@pytest.mark.parametrize("name", ["EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP"])
def test_file_systems_without_locks_and_flushes(shim, tmp_path, run, tried, name):
    """Folders are passed over; a file that cannot be flushed stays an error."""
    import errno

    code = """
import sys
from pathlib import Path
import files
files.flush(Path("."))
with files.lock(Path("folder")):
    print("inside")
Path("file").touch()
try:
    files.flush(Path("file"))
except OSError as error:
    print(error.errno)
"""
    number = str(getattr(errno, name))
    more = {"LD_PRELOAD": shim, "FAIL_WITH": number, "PYTHONPATH": str(ROOT)}
    process = run(tmp_path, "-c", code, FILES_FAIL_WITH=number, **more)
    assert process.stdout.split() == ["inside", number], process.stderr
    [line] = process.stderr.splitlines()
    assert line.startswith("warning: folder: this file system has no locks")
    tried(
        f"a folder's fsync and flock answer {name}",
        "saving goes on; without locks a warning names the folder",
    )


def test_a_run_on_such_a_file_system(shim, there, run):
    """Training saves and goes on, sampling paints."""
    more = {"LD_PRELOAD": shim, "FAIL_WITH": "22"}
    argv = [ROOT / "train.py", *TRAIN.replace("--out run", "--out new").split(), "--lr-schedule", "constant"]
    for steps, said in ((2, "trained to step 2"), (3, "goes on at step 2 of 3")):
        process = run(there, *argv, "--max-steps", steps, **more)
        assert process.returncode == 0 and said in process.stdout, process.stderr
        assert "warning: new: this file system has no locks" in process.stderr
    assert [c.name for c in checkpoint.checkpoints(there / "new")][-1] == "checkpoint-0000003"
    process = run(there, ROOT / "sample.py", *f"{LISTS} list.json --out new2".split(), **more)
    assert process.returncode == 0 and "warning: new2/list: this file" in process.stderr


def test_a_folder_is_locked_and_left_as_it_was(tmp_path):
    code = "import files, sys; from pathlib import Path\nwith files.lock(Path(sys.argv[1])): pass"
    with files.lock(tmp_path / "folder"):
        command = [sys.executable, "-c", code, str(tmp_path / "folder")]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 1 and "another process is at work" in process.stderr
    assert not (tmp_path / "folder").exists()


def test_files_are_written_with_the_usual_rights(tmp_path):
    """Temporary files of Python's own module could be read by their owner alone."""
    files.write_json(tmp_path / "a.json", {})
    (tmp_path / "b.json").write_text("{}")
    modes = {os.stat(tmp_path / name).st_mode for name in ("a.json", "b.json")}
    assert len(modes) == 1
