"""What every command owes its user: --json, --quiet, an example, one sentence for wrong arguments, plain text in files."""

import os
import pty
import re
import shlex
import subprocess
import sys

import pytest

from wandapp import cli, cli_habits
from wandapp.console import Output, Verbosity, set_verbosity

COMMANDS = dict(cli_habits.commands(cli_habits.complete(cli.app)))
OPTIONS = {path: {name for p in command.params for name in p.opts} for path, command in COMMANDS.items()}
EXAMPLES = [line for lines in cli_habits.EXAMPLES.values() for line in lines]


@pytest.fixture(autouse=True)
def normal_verbosity():
    yield
    set_verbosity(Verbosity.NORMAL)


def call(monkeypatch, capfd, line: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capfd.readouterr()


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_has_json_quiet_and_verbose(path):
    assert {"--json", "--quiet", "--verbose", "-q", "-v"} <= OPTIONS[path]


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_shows_an_example_in_its_help(path, monkeypatch, capfd):
    code, text, _ = call(monkeypatch, capfd, f"wandapp {path} --help")
    assert code == 0 and re.search(rf"wandapp {path} (?!\[)|wandapp {path}$", text, re.M)  # beside the usage line


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_use_commands_and_options_that_exist(line):
    words = shlex.split(line)
    path = max((path for path in COMMANDS if line.startswith(f"wandapp {path}")), key=len)
    assert {word for word in words if word.startswith("--")} <= OPTIONS[path]
    arguments = words[1 + len(path.split()) :]
    with COMMANDS[path].make_context(path, arguments, resilient_parsing=True) as context:
        assert not context.args  # nothing is left over


@pytest.mark.parametrize(
    ("line", "said"),
    {
        "wandapp prnue x": "No such command 'prnue'. Did you mean 'prune'? (see wandapp --help)",
        "wandapp prune x --spasity 2:4": "No such option: --spasity; did you mean --sparsity? (see wandapp prune --help)",
        "wandapp prune x --zzz": "No such option: --zzz (see wandapp prune --help)",
        "wandapp prune --sparsity": "Option '--sparsity' requires an argument",
        "wandapp generate": "Missing argument 'model' (see wandapp generate --help)",
        "wandapp export x y": "Missing option '--to'. Choose from: torch-2:4 (see wandapp export --help)",
        "wandapp eval x --seq-len many": "Invalid value for '--seq-len'",
        "wandapp bench inferense x": "Did you mean 'inference'? (see wandapp bench --help)",
    }.items(),
)
def test_wrong_arguments_get_one_sentence_and_exit_code_2(line, said, monkeypatch, capfd):
    code, text, errors = call(monkeypatch, capfd, line)
    assert (code, text, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith("wandapp: ") and said in errors


def test_no_arguments_show_the_commands_and_the_exit_codes(monkeypatch, capfd):
    code, text, errors = call(monkeypatch, capfd, "wandapp")
    assert code == 2 and all(words in text + errors for words in ("prune", "verify", "Exit codes:", "3  interrupted"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_for_every_shell(shell, monkeypatch, capfd):
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: (shell, f"/bin/{shell}"))  # whatever runs the tests
    code, text, _ = call(monkeypatch, capfd, "wandapp --show-completion")
    assert code == 0 and "_WANDAPP_COMPLETE" in text


def test_completion_proposes_commands_and_options():
    environment = os.environ | {"_WANDAPP_COMPLETE": "complete_bash", "COMP_WORDS": "wandapp pru", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "import sys; sys.argv = ['wandapp']; from wandapp.cli import main; main()"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["prune"], run.stderr


def test_quiet_keeps_warnings_and_result_only(capfd):
    set_verbosity(Verbosity.QUIET)
    output = Output()
    with output.progress("block") as update:
        update(1, 2)
        update(2, 2)
    output.note("loading")
    output.warn("look out")
    output.result("42")
    assert capfd.readouterr() == ("42\n", "warning: look out\n")


def test_progress_on_a_terminal_is_one_line_that_goes_away(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich: this is a terminal
    set_verbosity(Verbosity.NORMAL)
    with Output().progress("block") as update:
        for done in range(1, 10):
            update(done, 9, "1.5 GiB", 75.0)
    drawn = capfd.readouterr().err
    last = drawn.replace("\r", "\n").splitlines()
    assert any("9/9" in line and "eta 1:15" in line for line in last), drawn
    assert drawn.rstrip().endswith("\x1b[2K")  # the line is cleared


@pytest.mark.parametrize(("verbosity", "lines"), [(Verbosity.NORMAL, 2), (Verbosity.VERBOSE, 9)])
def test_progress_in_a_file_is_first_last_and_every_30_seconds_or_every_step(verbosity, lines, capfd):
    set_verbosity(verbosity)
    with Output().progress("block") as update:
        for done in range(1, 10):
            update(done, 9)
    assert len(capfd.readouterr().err.splitlines()) == lines


def test_progress_in_a_file_returns_after_30_seconds(capfd, monkeypatch):
    times = iter([0.0, 1.0, 20.0, 32.0, 40.0])
    monkeypatch.setattr("wandapp.console.time.monotonic", lambda: next(times))
    with Output().progress("block") as update:
        for done in range(1, 5):
            update(done, 9)
    assert [line.split()[1] for line in capfd.readouterr().err.splitlines()] == ["1/9", "3/9"]


def test_verbose_shows_where_an_error_arose(monkeypatch, capfd):
    code, _, errors = call(monkeypatch, capfd, "wandapp verify --verbose ./nope")
    assert (
        code == 2
        and "Traceback" in errors
        and errors.splitlines()[-1] == "wandapp: nope: no such folder; check the path"
    )


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_no_color_is_respected_on_a_terminal(environment):
    code = "from wandapp.console import Output; o = Output(); o.warn('careful')"
    ours, theirs = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    clean |= {"TERM": "xterm-256color"} | environment
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=clean, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1000)
    os.close(ours)
    assert b"careful" in shown and (b"\x1b[33m" in shown) == (not environment)
