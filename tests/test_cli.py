"""The entry scripts' plumbing, on a small script of its own: `sample` with four flags and a config."""

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from absl import flags as absl_flags
from absl import logging

from libs import cli
from libs.errors import UserError

CONFIG = '''
from ml_collections import ConfigDict
from libs.methods import apply_methods

def clockwork(config):
    config.policy = "clockwork"

def get_config(methods=""):
    config = ConfigDict({"policy": "full", "sampler": {"name": "ddim", "steps": 50, "eta": 0.0}})
    apply_methods(config, methods, {"clockwork": clockwork})
    return config
'''


def define_flags(fv):
    absl_flags.DEFINE_string("out", "outputs", "output folder", flag_values=fv)
    absl_flags.DEFINE_integer("batch_size", 16, "images at a time", lower_bound=1, flag_values=fv)
    absl_flags.DEFINE_enum("format", "png", ["png", "npz"], "kind of file", flag_values=fv)
    absl_flags.DEFINE_boolean("grid", True, "draw a grid", flag_values=fv)


class Script:
    """An entry script whose body notes what it was called with, or does `action`."""

    def __init__(self, takes_config="required", action=None):
        self.takes_config, self.action, self.calls = takes_config, action, []

    def main(self, argv):
        return cli.run(self.body(), define_flags, argv, takes_config=self.takes_config)

    def body(self):
        def sample(config, flags):
            self.calls.append((config, flags))
            return self.action() if self.action else None

        return sample


@pytest.fixture
def config(tmp_path) -> str:
    (tmp_path / "x.py").write_text(CONFIG)
    return f"--config={tmp_path}/x.py"


def raising(error):
    def action():
        raise error

    return action


def assert_refused(ran, line):
    assert (ran.status, ran.stdout, ran.stderr) == (2, "", f"error: {line}\n")


def test_body_gets_config_and_flags(run_main, config):
    script = Script()
    argv = [f"{config}:clockwork", "--config.sampler.steps=20", "--batch_size", 4, "--format=npz", "--nogrid"]
    assert run_main(script.main, *argv) == (0, "", "")
    [(built, flags)] = script.calls
    assert (built.policy, built.sampler.steps, built.sampler.eta) == ("clockwork", 20, 0.0)
    assert built.is_locked
    assert flags.overrides == {"sampler.steps"}
    assert flags.config == f"{config.removeprefix('--config=')}:clockwork"
    assert (flags.out, flags.batch_size, flags.format, flags.grid) == ("outputs", 4, "npz", False)


def test_calls_do_not_see_each_other(run_main, config):
    script = Script()
    run_main(script.main, config, "--config.sampler.steps=20", "--batch_size=4")
    run_main(script.main, "--config.sampler.eta", "1", config, "--grid")  # overrides may stand first
    first, second = script.calls
    assert (first[0].sampler.steps, second[0].sampler.steps) == (20, 50)
    assert (first[1].batch_size, second[1].batch_size) == (4, 16)
    assert second[0].sampler.eta == 1.0


def test_status_is_what_the_body_returns(run_main, config):
    assert run_main(Script(action=lambda: 3).main, config).status == 3


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["--config.sampler.stepz=50"],
            "--config.sampler.stepz=50: no such field in config.sampler; choose from eta, name, steps",
        ),
        (["--config.sampler.steps=abc"], "--config.sampler.steps=abc: want an int"),
        (["--config.sampler.steps"], "--config.sampler.steps: the value is missing"),
        (["--config.sampler.steps", "--out=x"], "--config.sampler.steps: the value is missing"),
        (["--sedes=3"], "--sedes: no such flag; choose from --batch_size, --config, --format, --grid, --out"),
        (["--noout"], "--noout: no such flag; choose from --batch_size, --config, --format, --grid, --out"),
        (["--out"], "--out: the value is missing"),
        (["--out", "--batch_size=3"], "--out: the value is missing"),
        (["--batch_size=abc"], "--batch_size=abc: want a positive integer"),
        (["--batch_size=0"], "--batch_size=0: want a positive integer"),
        (["--format=gif"], "--format=gif: want one of png, npz"),
        (["--grid=maybe"], "--grid=maybe: want true or false"),
        (["seeds"], "'seeds' is no flag; flags are written --name=value"),
        (["-out=x"], "'-out=x' is no flag; flags are written --name=value"),
    ],
)
def test_bad_command_lines(run_main, config, argv, line):
    script = Script()
    assert_refused(run_main(script.main, config, *argv), line)
    assert not script.calls


def test_config_that_is_missing(run_main, config, tmp_path):
    path = config.removeprefix("--config=")
    ran = run_main(Script().main, f"{config}:clockwerk")
    method = "method after the colon of --config='clockwerk' is unknown; choose from clockwork"
    assert_refused(ran, method)

    ran = run_main(Script().main, config.replace("x.py", "y.py"))
    assert ran.stderr.startswith(f"error: --config={path.replace('x.py', 'y.py')}: no such file; choose from")
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)

    ran = run_main(Script().main)
    assert ran.stderr.startswith("error: --config is missing; choose from")
    assert ran.status == 2

    line = "--config.sampler.steps=2: there is no --config=FILE whose field this could be"
    assert_refused(run_main(Script().main, "--config.sampler.steps=2"), line)


def test_scripts_without_config(run_main, config):
    optional, no = Script("optional"), Script("no")
    assert run_main(optional.main).status == run_main(no.main).status == 0
    assert optional.calls[0][0] is no.calls[0][0] is None
    assert run_main(optional.main, config).status == 0
    assert optional.calls[1][0].sampler.steps == 50
    assert_refused(
        run_main(no.main, config), "--config: no such flag; choose from --batch_size, --format, --grid, --out"
    )


def test_required_flag(run_main):
    def define(fv):
        absl_flags.DEFINE_string("images", None, "folder", flag_values=fv)
        absl_flags.mark_flag_as_required("images", fv)

    def main(argv):
        return cli.run(lambda config, flags: None, define, argv, takes_config="no")

    assert_refused(run_main(main), "--images is missing")
    assert run_main(main, "--images=x").status == 0
    assert run_main(main, "--help").status == 0


def test_help(run_main, config):
    script = Script()
    ran = run_main(script.main, "--help")
    assert (ran.status, ran.stderr, script.calls) == (0, "", [])
    lines = ran.stdout.splitlines()
    assert lines[0] == __doc__
    assert "  --batch_size=16            images at a time" in lines
    assert "--config.sampler" not in ran.stdout

    ran = run_main(script.main, f"{config}:clockwork", "--config.sampler.steps=7", "-h")
    lines = ran.stdout.splitlines()
    assert {"  --config.policy=clockwork", "  --config.sampler.steps=7"} < set(lines)
    assert (ran.status, script.calls) == (0, [])


def test_commands(run_main):
    def stats(config, flags):
        """Write reference statistics.

        Of a folder.
        """
        print("stats", config, flags.out)

    def lmdb(config, flags):
        """Pack images."""

    def main(argv):
        commands = {"stats": cli.Command(stats, define_flags), "lmdb": cli.Command(lmdb, lambda fv: None)}
        return cli.run_command(commands, argv, doc="Prepare data.")

    assert run_main(main, "stats", "--out=x") == (0, "stats None x\n", "")
    assert_refused(run_main(main, "stat", "--out=x"), "'stat' is no command; choose from stats, lmdb")
    assert_refused(run_main(main), "no command given; choose from stats, lmdb")
    assert_refused(run_main(main, "--out=x"), "no command given; choose from stats, lmdb")
    ran = run_main(main, "--help")
    assert ran.status == 0
    assert ran.stdout.splitlines()[0] == "Prepare data."
    assert "  stats            Write reference statistics." in ran.stdout.splitlines()
    assert "--batch_size=16" in run_main(main, "stats", "--help").stdout


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("--seeds=x: bad"), 2, "--seeds=x: bad"),
        (UserError("two\nlines"), 2, "two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b.png"), 2, "a/b.png: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "outputs: No space left on device"),
        (OSError("cannot identify image file 'a'"), 2, "cannot identify image file 'a'"),
        (torch.OutOfMemoryError("CUDA"), 2, "out of memory; use fewer rows a call or a smaller batch"),
        (MemoryError(), 2, "out of memory; use fewer rows a call or a smaller batch"),
    ],
)
def test_errors_of_the_body(run_main, config, error, status, line):
    ran = run_main(Script(action=raising(error)).main, config)
    assert (ran.status, ran.stdout, ran.stderr) == (status, "", f"error: {line}\n")


def test_memory_of_the_cpu(run_main, config):
    ran = run_main(Script(action=lambda: torch.empty(2**58)).main, config)
    assert_refused(ran, "out of memory; use fewer rows a call or a smaller batch")


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug"), KeyError("bug")])
def test_bugs_keep_their_trace(run_main, config, error):
    with pytest.raises(type(error), match="bug"):
        run_main(Script(action=raising(error)).main, config)


def test_only_the_main_process_speaks(run_main, config, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")  # first of the second machine
    assert not cli.is_main_process()
    assert run_main(Script(action=lambda: logging.info("step 1")).main, config) == (0, "", "")
    assert run_main(Script(action=raising(KeyboardInterrupt())).main, config) == (130, "", "")

    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)  # nobody ended it: the error is this process's own
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    ran = run_main(Script(action=full).main, config)
    assert (ran.status, ran.stderr) == (2, "error (process 1): outputs: No space left on device\n")
    assert waits == [cli.PATIENCE]

    monkeypatch.setenv("RANK", "0")
    assert cli.is_main_process()
    assert run_main(Script().main, config, "--sedes=3").stderr.startswith("error: --sedes")
    assert waits == [cli.PATIENCE]


def test_log_lines_are_short(run_main, config):
    ran = run_main(Script(action=lambda: logging.info("step %d", 100)).main, config)
    prefix, time, text = ran.stderr.split(" ", 2)
    assert (prefix, text) == ("I", "step 100\n")
    assert len(time) == len("12:30:05")


def test_known_warnings_are_quiet(run_main, config):
    def action():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).step()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
        assert len(caught) == 1
        run_main(Script(action=action).main, config)
        assert len(caught) == 1


def test_output_dir(tmp_path):
    made = cli.output_dir(str(tmp_path / "a/b"))
    assert made == tmp_path / "a/b"
    assert made.is_dir()
    assert list(made.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match=f"--keep_images={path}: cannot write there"):
            cli.output_dir(path, "keep_images")
    with pytest.raises(UserError, match="--out=/proc/x: cannot write there"):
        cli.output_dir("/proc/x")


def test_choose_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert cli.choose_device() == cli.choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(UserError, match=f"device='{name}' is not available here; choose from auto, cpu"):
            cli.choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.choose_device() == torch.device("cuda")
    assert cli.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="choose from auto, cuda, cuda:0, cuda:1, cpu"):
        cli.choose_device("cuda:2")


def test_as_a_command_from_another_folder(tmp_path, config):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom libs import cli\n"
        "from absl import logging\n"
        "def body(config, flags):\n    print(config.sampler.steps)\n    logging.info('done')\n"
        "sys.exit(cli.run(body, lambda fv: None))\n"
    )
    root = Path(cli.__file__).parents[1]
    (tmp_path / "elsewhere").mkdir()

    def run(*argv):
        command = [sys.executable, str(script), *argv]
        env = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.run(command, cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True)

    ran = run("--config=../x.py", "--config.sampler.steps=3")
    assert (ran.returncode, ran.stdout) == (0, "3\n")
    assert ran.stderr.startswith("I ")
    assert ran.stderr.endswith(" done\n")
    assert ran.stderr.count("\n") == 1  # in a process without pytest's handlers, too
    ran = run("--config=../x.py", "--config.sampler.steps=three")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: --config.sampler.steps=three: want an int\n"
