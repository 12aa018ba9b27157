"""How a command reads its options, tells mistakes, and outlives the terminal it was started from."""

import json
import os
import subprocess
import sys

import pytest

import children
import evaluator
import sample
import train
from conftest import ROOT, SAMPLE, TRAIN
from infra import commands
from infra.commands import InputError
from infra.files import text_sha256
from label_files import load_conditions, load_objects

SCRIPTS = ["train.py", "sample.py", "evaluator.py", "checkpoint.py"]
MODULES = ["report", "report.metrics", "data.render"]
COMMANDS = {name: [name] for name in SCRIPTS} | {f"python -m {name}": ["-m", name] for name in MODULES}
# As `python` with these arguments does it; says when PyTorch is imported, and at the end whether it was.
CODE = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.addaudithook(lambda event, args: event == "import" and args[0] == "torch" and print("TORCH", flush=True))
try:
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
LIST = f"{SAMPLE} list.json --out new"
NEW_RUN = TRAIN.replace("--out run", "--out new")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_mistakes_are_told_before_torch_is_loaded(run, command):
    told = run(ROOT, "-c", CODE, *COMMANDS[command], "--help")
    assert told.returncode == 0 and told.stdout.startswith(f"usage: {command}")
    assert told.stdout.endswith("False\n")
    wrong = run(ROOT, "-c", CODE, *COMMANDS[command], "--no-such-option")
    assert wrong.returncode == 2 and wrong.stdout == "False\n"
    [line] = wrong.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(f"{command} --help lists all options")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "argv", "name"),
    [("sample.py", "--mode nothing", "sample.py"), ("python -m report", "nothing", "report")],
)
def test_a_command_says_that_it_loads_torch_before_it_does(run, command, argv, name):
    """Which takes seconds: a reader of the log sees at once that something happens."""
    process = run(ROOT, "-c", CODE, *COMMANDS[command], *argv.split())
    first, second, *_ = process.stdout.splitlines()
    assert first == f"{name}: loading PyTorch" and second == "TORCH"


# --------------------------------------------------------------------------------------------------- messages


def test_an_option_may_not_be_abbreviated(refused, tmp_path):
    assert train.parse_args(["--lr", "1e-3"]).learning_rate == 1e-3
    refused(train.main, ["--learning-rat", 1], "--learning-rat", "did you mean --learning-rate?")
    refused(sample.main, ["--mode", "test", "--step", 3], "did you mean --steps?")


PAINT = ["--weights", "weights", "--mode"]
UNKNOWN = "new_tset: no such file, nor a list of that name; did you mean new_test?"
WRONG_NAMES = [  # the command, its options, words that the line must hold
    (sample.main, [*PAINT, "new_tset"], UNKNOWN),
    (sample.main, [*PAINT, "x"], "there are test, new_test, validation, train, unseen, process, "),
    (sample.main, [*PAINT, "process", "--objects", "red cub"], "'red cub'; did you mean red cube?"),
    (sample.main, ["--mode", "test", "--weights", "runs/smal"], "did you mean runs/small?"),
    (train.main, ["--labels", "label.json"], "label.json: no such file; did you mean labels.json?"),
    (train.main, [*TRAIN.split(), "--init", "runs/smal"], "did you mean runs/small?"),
]


@pytest.mark.parametrize(("main", "argv", "words"), WRONG_NAMES, ids=[argv[-1] for _, argv, _ in WRONG_NAMES])
def test_a_name_that_there_is_not_is_told_with_the_nearest_one(there, refused, tried, main, argv, words):
    """Or with all that there are."""
    (there / "runs").mkdir()
    (there / "run").rename(there / "runs" / "small")
    refused(main, argv, words)
    tried(f"`{' '.join(argv[-2:])}`", f"exit 2: ... {words}")


def test_a_long_mistake_is_cut(refused):
    refused(train.main, ["--seed", "1" * 100_000], "--seed", "...")


def test_a_finished_run_names_the_options_that_train_it_further(there, capsys):
    train.main([*TRAIN.split(), "--max-steps", "2"])
    said = "was finished, with 2 steps; to train it further: --init run --out run-2"
    assert said in capsys.readouterr().out


SEEDED = [
    (train.main, f"{NEW_RUN} --max-steps 1"),
    (sample.main, LIST),
    (evaluator.main, "pictures --labels labels.json --train --epochs 1 --out new/judge.pth"),
]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 10**30])
def test_a_seed_works_if_it_is_one_that_torch_takes_and_is_refused_otherwise(there, refused, seed):
    for main, options in SEEDED:
        argv = [*options.split(), "--seed", str(seed)]
        if seed < 2**63:
            main(argv)
        else:
            refused(main, argv, "--seed", "expected a number from 0 to 9223372036854775807")


# ------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_json_file_of_powershell_is_the_same_as_one_in_utf_8(tmp_path, tried, encoding):
    """With a byte order mark, in UTF-16, with other ends of lines: the same list, of the same hash."""
    text = '[["red cube"],\n ["blue sphere"]]'
    (tmp_path / "plain.json").write_text(text)
    (tmp_path / "other.json").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    found = load_conditions(tmp_path / "other.json", load_objects())
    assert found == [["red cube"], ["blue sphere"]]
    assert text_sha256(tmp_path / "other.json") == text_sha256(tmp_path / "plain.json")
    tried(f"a label file in {encoding}", "is read, and is the same as in UTF-8")


@pytest.mark.slow
def test_a_tilde_is_the_home_folder(there, monkeypatch, refused):
    monkeypatch.setenv("HOME", str(there))
    sample.main([*LIST.split(), "--out=~/x"])
    assert (there / "x" / "list" / "0.png").exists()
    sample.main(["--weights=~/weights", "--mode=~/list.json"])
    refused(sample.main, [*LIST.split(), "--out=~nobody-of-this-name/x"], "there is no such user")


@pytest.mark.slow
def test_a_terminal_of_ascii_gets_escapes_for_what_it_cannot_show(there, run, tried):
    (there / "weights").rename(there / "schön")
    argv = [*LIST.split(), "--weights", "schön"]
    plain = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii:strict"}
    process = run(there, ROOT / "sample.py", *argv, **plain)
    assert process.returncode == 0, process.stderr
    assert "weights: sch\\xf6n" in process.stdout
    tried("a terminal that knows only ASCII", "gets escapes")


# -------------------------------------------------------------------------------------------------- terminals


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["| head -n 1", "2>&1 | true", "<&- >&- 2>&-"])
def test_sampling_goes_on_when_nobody_reads_its_output(there, tried, closed):
    # The one without any stream needs a Python of its own.
    python = sys.executable if "<&-" in closed else children.warm_python()
    argv = [python, ROOT / "sample.py", *LIST.split()]
    command = f"{' '.join(map(str, argv))} {closed}; echo ${{PIPESTATUS[0]}} >code"
    process = subprocess.run(["bash", "-c", command], cwd=there, capture_output=True, text=True, timeout=300)
    assert (there / "code").read_text() == "0\n", process.stderr
    assert "Traceback" not in process.stderr and "Broken" not in process.stderr
    assert json.loads((there / "new" / "list.json").read_text())["accuracies"]
    tried(f"`sample.py ... {closed.replace('|', '/')}`", "paints all, exit 0")


@pytest.mark.slow
def test_training_goes_on_when_nobody_reads_its_output(there, tried):
    argv = [children.warm_python(), ROOT / "train.py", *NEW_RUN.split()]
    command = f"{' '.join(map(str, argv))} --max-steps 12 2>&1 | head -n 1; echo ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], cwd=there, capture_output=True, text=True, timeout=300)
    assert process.stdout.splitlines() == ["train.py: loading PyTorch", "0"], process.stderr
    assert (there / "new" / "checkpoint-0000012").exists()
    help_text = f"{sys.executable} {ROOT / 'train.py'} --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", help_text], capture_output=True, text=True, timeout=60)
    assert process.stdout.endswith("\n0\n") and not process.stderr
    tried("`train.py ... 2>&1 / head -n 1`", "trains to the end, exit 0")


@pytest.mark.slow
def test_a_mistake_is_told_where_there_is_no_stdout(tmp_path):
    """An InputError's line, though Python has no stream to begin with."""
    command = f"PYTHONPATH={ROOT} {sys.executable} -m report.metrics nothing >&-; echo $? >code"
    process = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "code").read_text() == "2\n"
    assert process.stderr == "error: nothing.json: no such file\n"


def test_an_input_error_is_one_line(capsys):
    @commands.command
    def main(argv):
        raise InputError(f"two{os.linesep}lines")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and capsys.readouterr().err == "error: two lines\n"
