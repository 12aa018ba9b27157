"""Files and folders: what is the user's stays, one command at a time is in a folder, and a file system that
lacks a call is written to all the same."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint
import children
import evaluator
import sample
import train
from children import wait_for_text
from conftest import ROOT, SAMPLE, TRAIN, listing
from data import render
from infra import files
from report import __main__ as report

NEW_RUN = TRAIN.replace("--out run", "--out new")
COMMANDS = {
    "train": (train.main, NEW_RUN),
    "sample": (sample.main, f"{SAMPLE} list.json --out new"),
    "two lists": (sample.main, f"{SAMPLE} list.json second/other.json --out new"),
    "strip": (sample.main, f"{SAMPLE} process --out new"),
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
def test_a_command_refuses_a_folder_with_what_is_not_its_own_and_leaves_it_as_it_is(
    there, refused, tried, command, name, words
):
    (there / "new" / name).parent.mkdir(parents=True)
    (there / "new" / name).write_text('{"mine": 1}')
    (there / "second").mkdir()
    shutil.copy(there / "list.json", there / "second" / "other.json")
    before, contents = listing(there), whole_listing(there)
    main, argv = COMMANDS[command]
    refused(main, argv.split(), words)
    assert listing(there) == before and whole_listing(there) == contents
    tried(f"{command} into a folder with a user's {name}", f"exit 2: {words} ...; the folder is untouched")


def test_a_pack_replaces_nothing_but_a_pack(pictures, tmp_path, refused):
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


def test_a_folder_with_nothing_but_a_lock_and_a_temporary_file_counts_as_empty(there):
    """A command that was killed left them."""
    for name in ("new", "images2/list"):
        (there / name).mkdir(parents=True)
        (there / name / ".lock").touch()
        (there / name / ".iclevr-ddpm-0123").mkdir()
    train.main(f"{NEW_RUN} --max-steps 1".split())
    sample.main(f"{SAMPLE} list.json --out images2".split())
    assert sorted(p.name for p in (there / "images2" / "list").iterdir()) == ["0.png", "1.png"]


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


CODE = """
from pathlib import Path
from infra import files
files.flush(Path("."))
with files.lock(Path("folder")):
    print("inside")
Path("file").touch()
try:
    files.flush(Path("file"))
except OSError as error:
    print(error.errno)
"""


@pytest.mark.parametrize("name", ["EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP"])
def test_a_folder_that_cannot_be_flushed_or_locked_is_passed_over(shim, tmp_path, run, tried, name):
    """A warning says that it has no lock. A file that cannot be flushed stays an error."""
    number = str(getattr(errno, name))
    more = {"LD_PRELOAD": shim, "FAIL_WITH": number, "PYTHONPATH": str(ROOT)}
    process = run(tmp_path, "-c", CODE, FILES_FAIL_WITH=number, **more)
    assert process.stdout.split() == ["inside", number], process.stderr
    [line] = process.stderr.splitlines()
    assert line.startswith("warning: folder: this file system has no locks")
    tried(f"a folder's fsync and flock answer {name}", "saving goes on; without locks a warning names the folder")


TRAIN_AND_SAMPLE = """
import sample, train
for steps in "23":
    train.main([*"{train} --lr-schedule constant --max-steps".split(), steps])
sample.main("{sample}".split())
"""


@pytest.mark.slow
def test_on_a_file_system_without_locks_training_goes_on_and_sampling_paints(shim, there, run):
    more = {"LD_PRELOAD": shim, "FAIL_WITH": "22"}
    code = TRAIN_AND_SAMPLE.format(train=NEW_RUN, sample=f"{SAMPLE} list.json --out new2")
    process = run(there, "-c", code, PYTHONPATH=str(ROOT), **more)
    assert process.returncode == 0, process.stderr
    assert "trained to step 2" in process.stdout and "goes on at step 2 of 3" in process.stdout
    assert process.stderr.count("warning: new: this file system has no locks") == 2
    assert "warning: new2/list: this file" in process.stderr
    assert [c.name for c in checkpoint.checkpoints(there / "new")][-1] == "checkpoint-0000003"


# ------------------------------------------------------------------------------------------- locks and rights


def test_a_locked_folder_keeps_others_out_and_is_left_as_it_was(tmp_path):
    code = """
import sys
from pathlib import Path
from infra import files
with files.lock(Path(sys.argv[1])):
    pass
"""
    with files.lock(tmp_path / "folder"):
        command = [sys.executable, "-c", code, str(tmp_path / "folder")]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 1 and "another process is at work" in process.stderr
    assert not (tmp_path / "folder").exists()


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_unless_the_first_one_is_dead(argv, tmp_path, tried):
    out = tmp_path / "run"
    command = argv(out, "--max-steps", 100_000)
    first = children.start("train", command, tmp_path)
    wait_for_text(out / "log.jsonl")
    (tmp_path / "second").mkdir()
    second = children.start("train", command, tmp_path / "second")
    assert children.finish(second) == 2
    assert children.output(tmp_path / "second").splitlines()[-1] == (
        f"error: {out}: another process is at work in there; wait for it or choose --out"
    )
    first.kill()
    children.finish(first)
    assert (out / ".lock").exists()
    train.main(argv(out, "--max-steps", 2))
    assert [c.name for c in checkpoint.checkpoints(out)] == ["checkpoint-0000002"]
    tried("two runs into one folder", "exit 2: ... another process is at work in there")
    tried("a run into the folder of one that was killed", "goes on; a dead process holds no lock")


def test_files_are_written_with_the_usual_rights(tmp_path):
    """Temporary files of Python's own module could be read by their owner alone."""
    files.write_json(tmp_path / "a.json", {})
    (tmp_path / "b.json").write_text("{}")
    modes = {(tmp_path / name).stat().st_mode for name in ("a.json", "b.json")}
    assert len(modes) == 1
