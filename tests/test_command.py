"""What the commands share: a mistake of the user's is one line that says how to mend it."""

import subprocess
import sys

import pytest
from absl import flags

from jaxtok import command
from jaxtok.build import check_keys
from tests import runs


@pytest.mark.parametrize(
    "option, says",
    [
        ("--config.x.y=1", 'the config has no key "x". Known: accumulate, '),
        ("--config.schedule.peek_lr=1", 'config.schedule has no key "peek_lr". Did you mean "peak_lr"?'),
        ("--config.task.samplers[5].steps=1", 'config.task.samplers has no key "5". Known: 0, 1.'),
        ("--config.task.samplers.0.steps=1", "Could not parse 'task.samplers.0.steps'"),
        ("--config.total_steps.x=1", 'config.total_steps has no key "x". Known: none.'),
        ("--config.total_steps=x", "invalid literal for int"),
        ("--config=flexto", 'There is no config "flexto"'),
    ],
)
def test_a_wrong_option_of_a_config_is_an_error_of_flags(option, says, monkeypatch):
    values = flags.FlagValues()
    command.define_config("text", values)
    arguments = ["train", "--config=flextok:tiny", option]
    monkeypatch.setattr(sys, "argv", arguments)  # where config_flags looks for the options
    with pytest.raises(flags.Error) as error:
        values(arguments)
    assert says in str(error.value)


def test_a_right_one_is_taken(monkeypatch):
    values = flags.FlagValues()
    command.define_config("text", values)
    arguments = ["train", "--config=flextok:tiny", "--config.schedule.peak_lr=0.5", "--config.task.samplers[1].steps=7"]
    monkeypatch.setattr(sys, "argv", arguments)
    values(arguments)
    assert values.config.schedule.peak_lr == 0.5 and values.config.task.samplers[1]["steps"] == 7


def test_an_option_is_a_pair():
    words = ["steps=20", "guidance=7.5", "solver=heun"]
    assert dict(map(command.pair, words)) == {"steps": 20, "guidance": 7.5, "solver": "heun"}
    with pytest.raises(ValueError, match='KEY=VALUE, and not "steps"'):
        command.pair("steps")


def test_what_jaxtok_refuses_is_one_line_and_what_nobody_foresaw_has_its_traceback(capsys, tmp_path):
    @command.one_line("python -m jaxtok.x")
    def main(work):
        work()

    for work, says in (
        (lambda: check_keys(["a"], ["b"], "x"), 'x has no key "a". Known: b.'),
        ((tmp_path / "missing").read_text, f"'{tmp_path / 'missing'}'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(work)
        assert stop.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("python -m jaxtok.x: ") and line.endswith(says)
    for bug, error in ((lambda: int("a"), ValueError), (lambda: check_keys(None, (), ""), TypeError)):
        with pytest.raises(error):
            main(bug)


@pytest.mark.parametrize(
    "line, says",
    [
        ("train --config=flextok:tiny --workdir={0} --config.batch_size=7", "batch of 7 cannot be split"),
        ("train --config=flextok:tiny --workdir={0} more", "--config=FILE, --workdir=DIR"),
        ("tokenize --checkpoint={0} --out={0}/codes", "{0} is no workdir with checkpoints/"),
        ("evaluate --checkpoint={0} --limit=4 --batch=8 --tokens=1,8", "{0} is no workdir of a run"),
        ("evaluate --checkpoint={0} --tokens=a", "write numbers, as 1,4,16"),
        ("evaluate --checkpoint={0} --processes=2", "--processes and --process need --coordinator"),
        ("plan --config=flextok:tiny --topology=v9:2x2", 'Topology "v9:2x2"'),
        ("pretrained.convert {0} --out={0}/out", "{0}"),
    ],
)
def test_the_commands_say_a_mistake_in_a_line(line, says, tmp_path):
    words = line.format(tmp_path).split()
    done = subprocess.run(
        [sys.executable, "-m", f"jaxtok.{words[0]}", *words[1:]], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode and says.format(tmp_path) in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
