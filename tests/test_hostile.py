"""Input that is broken, or made to hurt, through the real entry points: one line that names file and entry,
exit code 2, and not a file more than before. The inputs are in hostile_inputs.py."""

import json
import struct
from pathlib import Path

import pytest

import checkpoint
import children
import evaluator
import sample
import spoil
import train
from conftest import ROOT, SAMPLE, TRAIN, listing
from dataset import read_picture
from hostile_inputs import INPUTS
from infra.commands import InputError
from label_files import load_objects
from report import __main__ as report
from report import metrics

COMMANDS = {  # that meet a fault in the folder `there`: main, options
    "train": (train.main, TRAIN),
    "resume": (train.main, f"{TRAIN} --max-steps 2"),
    "train.npz": (train.main, f"--model small --labels {ROOT / 'train.json'} --data pack.npz --out new"),
    "sample": (sample.main, f"{SAMPLE} list.json"),
    "unseen": (sample.main, f"{SAMPLE} unseen"),
    "evaluator": (evaluator.main, "pictures --labels list.json --weights evaluator.pth"),
    "metrics": (metrics.main, "images/list"),
    "report": (report.main, "images"),
    "checkpoint": (checkpoint.main, "weights shipped"),
}
# A few of the quick ones: of a command, a kind of file and a way to break it one each.
QUICK = [
    "labels: cut off",
    "conditions: 30 objects",
    "picture: a pipe, which would wait for ever",
    "pack: code in an array",
    "weights: a pickle with code in it",
    "network: 10^12 channels",
    "run: words for losses",
    "evaluator: code beside its tensors",
    "report: words for accuracies",
]
ROWS = [pytest.param(*row, id=row[0], marks=() if row[0] in QUICK else pytest.mark.slow) for row in INPUTS]


@pytest.mark.parametrize(("fault", "command", "way", "words"), ROWS)
def test_a_spoilt_input_is_told_in_one_line_and_nothing_is_written(there, tmp_path, tried, fault, command, way, words):
    """In a process of its own, so that all counts which Python and the libraries print."""
    name, *arguments = way
    getattr(spoil, name)(*arguments)
    before = listing(there)
    main, options = COMMANDS[command]
    process = children.start(main.__module__, options.split(), tmp_path, there)
    code = children.finish(process)
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and words in lines[0] and len(lines[0]) < 500, lines[0]
    assert listing(there) == before
    said = lines[0].removeprefix("error: ").replace(f"{there}/", "").replace(f"{ROOT}/", "")
    tried(fault, f"exit 2: {said[:160].replace('|', '/')}{'...' if len(said) > 160 else ''}")


def test_there_are_enough_inputs_and_each_has_a_name_of_its_own():
    faults = [row[0] for row in INPUTS]
    assert len(faults) >= 40 and len(set(faults)) == len(faults)
    assert set(QUICK) <= set(faults)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["labels: a key twice", "weights: a pickle with code in it"])
def test_a_spoilt_input_is_told_in_one_line_by_a_command_of_the_shell(there, run_warm, fault):
    [(_, command, (way, *arguments), words)] = [row for row in INPUTS if row[0] == fault]
    getattr(spoil, way)(*arguments)
    process = run_warm(there, ROOT / f"{command}.py", *COMMANDS[command][1].split())
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    assert words in process.stderr and not Path("the_code_has_run").exists()


@pytest.mark.slow
def test_the_folder_is_good_before_it_is_spoilt(there, capsys):
    """So that it is the fault which is refused."""
    for name in ("sample", "metrics", "checkpoint", "resume"):  # the evaluator's pictures are not numbered
        main, options = COMMANDS[name]
        main(options.split())


@pytest.mark.slow
def test_an_object_file_without_colours_or_with_an_index_twice_is_refused(clone, run):
    """The lab's objects.json drops in, and so may another."""
    (clone / "objects.json").write_text(json.dumps({f"object{i}": i for i in range(24)}))
    process = run(clone, "sample.py", "--mode", "test")
    assert process.returncode == 2
    assert process.stderr.endswith("objects.json, entry 'object0': expected a colour and a shape\n")
    (clone / "objects.json").write_text(json.dumps({**load_objects(), "gray cube": 1}))
    words = "objects.json: expected 24 names with the indices 0 to 23, each once"
    with pytest.raises(InputError, match=words):
        load_objects(clone / "objects.json")


def test_sixteen_bits_become_the_high_eight(tmp_path):
    """As Pillow reads them."""
    row = b"\0" + struct.pack(">6H", 0x1234, 0xABCD, 0xFF00, 0, 255, 256)
    (tmp_path / "a.png").write_bytes(spoil.png(2, 2, 16, row + row))
    assert read_picture(tmp_path / "a.png")[:, 0, 0].tolist() == [0x12, 0xAB, 0xFF]
