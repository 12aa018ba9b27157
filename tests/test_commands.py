"""How a command reads its options, tells mistakes, and outlives the terminal it was started from."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, TRAIN

import evaluator
import sample
import train
from infra import commands
from infra.commands import InputError
from infra.files import text_sha256
from labels import load_conditions, load_objects

SCRIPTS = ("train", "sample", "evaluator", "metrics", "report", "checkpoint", "render")
CODE = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.addaudithook(lambda event, args: event == "import" and args[0] == "torch" and print("TORCH", flush=True))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
LIST = "--weights weights --evaluator evaluator.pth --mode list.json --out new"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_mistakes_come_before_torch(run, script):
    told = run(ROOT, "-c", CODE, f"{script}.py", "--help")
    assert told.returncode == 0 and told.stdout.startswith(f"usage: {script}.py")
    assert told.stdout.endswith("False\n")
    wrong = run(ROOT, "-c", CODE, f"{script}.py", "--no-such-option")
    assert wrong.returncode == 2 and wrong.stdout == "False\n"
    [line] = wrong.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(f"{script}.py --help lists all options")


@pytest.mark.parametrize(("script", "argv"), [("sample", "--mode nothing"), ("report", "nothing")])
def test_the_first_line_comes_before_torch(run, script, argv):
    """Which takes seconds to load: a reader of the log sees at once that something happens."""
    process = run(ROOT, "-c", CODE, f"{script}.py", *argv.split())
    first, second, *_ = process.stdout.splitlines()
    assert first == f"{script}.py: loading PyTorch" and second == "TORCH"


# --------------------------------------------------------------------------------------------------- messages


def test_options_have_no_abbreviations(refused, tmp_path):
    assert train.parse_args(["--lr", "1e-3"]).learning_rate == 1e-3
    refused(train.main, ["--learning-rat", 1], "--learning-rat", "did you mean --learning-rate?")
    refused(sample.main, ["--mode", "test", "--step", 3], "did you mean --steps?")


def test_names_that_there_are_not_tell_what_there_is(there, refused, tried):
    paint = ["--weights", "weights", "--mode"]
    cases = [
        (
            sample.main,
            [*paint, "new_tset"],
            "new_tset: no such file, nor a list of that name; did you mean new_test?",
        ),
        (sample.main, [*paint, "x"], "there are test, new_test, validation, train, unseen, process, "),
        (sample.main, [*paint, "process", "--objects", "red cub"], "'red cub'; did you mean red cube?"),
        (sample.main, ["--mode", "test", "--weights", "runs/smal"], "did you mean runs/small?"),
        (train.main, ["--labels", "label.json"], "label.json: no such file; did you mean labels.json?"),
        (train.main, [*TRAIN.split(), "--init", "runs/smal"], "did you mean runs/small?"),
    ]
    (there / "runs").mkdir()
    (there / "run").rename(there / "runs" / "small")
    for main, argv, words in cases:
        refused(main, argv, words)
        tried(f"`{' '.join(argv[-2:])}`", f"exit 2: ... {words}")


def test_a_long_mistake_is_cut(refused):
    refused(train.main, ["--seed", "1" * 100_000], "--seed", "...")


def test_a_finished_run_names_what_goes_on(there, capsys):
    train.main([*TRAIN.split(), "--max-steps", "2"])
    assert (
        "was finished, with 2 steps; to train it further: --init run --out run-2" in capsys.readouterr().out
    )


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 10**30])
def test_seeds_of_any_size(there, refused, seed):
    """Those that PyTorch's generators take work, others are refused."""
    commands = [(train.main, f"{TRAIN} --max-steps 1".replace("--out run", "--out new")), (sample.main, LIST)]
    commands += [(evaluator.main, "pictures --labels labels.json --train --epochs 1 --out new/judge.pth")]
    for main, argv in commands:
        argv = [*argv.split(), "--seed", str(seed)]
        if seed < 2**63:
            main(argv)
        else:
            refused(main, argv, "--seed", "expected a number from 0 to 9223372036854775807")


# ------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_of_powershell_is_read(tmp_path, tried, encoding):
    """With a byte order mark, in UTF-16, with other ends of lines: the same list, of the same hash."""
    text = '[["red cube"],\n ["blue sphere"]]'
    (tmp_path / "plain.json").write_text(text)
    (tmp_path / "other.json").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    found = load_conditions(tmp_path / "other.json", load_objects())
    assert found == [["red cube"], ["blue sphere"]]
    assert text_sha256(tmp_path / "other.json") == text_sha256(tmp_path / "plain.json")
    tried(f"a label file in {encoding}", "is read, and is the same as in UTF-8")


def test_a_tilde_is_the_home_folder(there, monkeypatch, refused):
    monkeypatch.setenv("HOME", str(there))
    sample.main([*LIST.split(), "--out=~/x"])
    assert (there / "x" / "list" / "0.png").exists()
    sample.main(["--weights=~/weights", "--mode=~/list.json"])
    refused(sample.main, [*LIST.split(), "--out=~nobody-of-this-name/x"], "there is no such user")


def test_a_terminal_of_ascii(there, run, tried):
    """Gets escapes for what it cannot show."""
    (there / "weights").rename(there / "schön")
    argv = [*LIST.split(), "--weights", "schön"]
    plain = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii:strict"}
    process = run(there, ROOT / "sample.py", *argv, **plain)
    assert process.returncode == 0, process.stderr
    assert "weights: sch\\xf6n" in process.stdout
    tried("a terminal that knows only ASCII", "gets escapes")


# -------------------------------------------------------------------------------------------------- terminals


@pytest.mark.parametrize("closed", ["| head -n 1", "2>&1 | true", "<&- >&- 2>&-"])
def test_output_that_nobody_reads_ends_nothing(there, tried, closed):
    argv = [sys.executable, ROOT / "sample.py", *LIST.split()]
    command = f"{' '.join(map(str, argv))} {closed}; echo ${{PIPESTATUS[0]}} >code"
    process = subprocess.run(["bash", "-c", command], cwd=there, capture_output=True, text=True, timeout=300)
    assert (there / "code").read_text() == "0\n", process.stderr
    assert "Traceback" not in process.stderr and "Broken" not in process.stderr
    assert json.loads((there / "new" / "list.json").read_text())["accuracies"]
    tried(f"`sample.py ... {closed.replace('|', '/')}`", "paints all, exit 0")


def test_training_outlives_its_terminal(there, tried):
    argv = [sys.executable, ROOT / "train.py", *TRAIN.replace("--out run", "--out new").split()]
    command = f"{' '.join(map(str, argv))} --max-steps 12 2>&1 | head -n 1; echo ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], cwd=there, capture_output=True, text=True, timeout=300)
    assert process.stdout.splitlines() == ["train.py: loading PyTorch", "0"], process.stderr
    assert (there / "new" / "checkpoint-0000012").exists()
    help_text = f"{sys.executable} {ROOT / 'train.py'} --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", help_text], capture_output=True, text=True, timeout=60)
    assert process.stdout.endswith("\n0\n") and not process.stderr
    tried("`train.py ... 2>&1 / head -n 1`", "trains to the end, exit 0")


def test_nohup_is_respected():
    """Where SIGHUP is ignored from the start it stays so; outside of the main thread nothing is handled."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert commands.handled(commands.STOP) == [signal.SIGTERM, signal.SIGUSR1]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert commands.handled(commands.STOP) == commands.STOP
    finally:
        signal.signal(signal.SIGHUP, before)
    found = []
    thread = threading.Thread(target=lambda: found.append(commands.handled(commands.STOP)))
    thread.start()
    thread.join()
    assert found == [[]]


def test_a_mistake_is_told_where_there_is_no_stdout(tmp_path):
    """An InputError's line, though Python has no stream to begin with."""
    command = f"PYTHONPATH={ROOT} {sys.executable} -m report.metrics nothing >&-; echo $? >code"
    process = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (tmp_path / "code").read_text() == "2\n"
    assert process.stderr == "error: nothing.json: no such file\n"


def test_input_errors_are_one_line(capsys):
    @commands.command
    def main(argv):
        raise InputError(f"two{os.linesep}lines")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and capsys.readouterr().err == "error: two lines\n"
