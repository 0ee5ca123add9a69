"""Shell scripts on a stand-in for their virtual environment: its programs do nothing but note how they were called."""

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
BASH = shutil.which("bash")
PROGRAM = """#!{bash}
{answers}
[ "$1" = -c ] && exit 0
[ "$2" = pip ] && exit 0
printf '%q ' "$@" >>{calls}
echo >>{calls}
"""
Run = Callable[..., tuple[subprocess.CompletedProcess, list[list[str]]]]


def noting(folder: Path, answers: str = "", **places: Path) -> Run:
    """`run(name, *argv, cwd=None, **env)` of scripts/NAME: (what bash says, the noted commands, each a list of words).

    answers: lines of bash that the programs run first. places: variables of every run; None in `env` takes one out.
    """
    venv, calls = folder / "noting", folder / "noted"
    (venv / "bin").mkdir(parents=True)
    for program in ("python", "accelerate"):
        (venv / "bin" / program).write_text(PROGRAM.format(bash=BASH, calls=shlex.quote(str(calls)), answers=answers))
        (venv / "bin" / program).chmod(0o755)
    (venv / "bin/activate").write_text(f"PATH={shlex.quote(str(venv))}/bin:$PATH\n")

    def run(name, *argv, cwd=None, **env):
        calls.unlink(missing_ok=True)
        env = {"PATH": "/usr/bin:/bin", "VENV": venv, **places, **env}
        ran = subprocess.run([BASH, SCRIPTS / name, *map(str, argv)], cwd=cwd, capture_output=True, text=True,
                             env={key: str(value) for key, value in env.items() if value is not None})
        return ran, [shlex.split(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return run
