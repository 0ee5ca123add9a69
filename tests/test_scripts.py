"""The environment that the shell scripts share, on a stand-in for a virtual environment that notes calls."""

import shutil
import subprocess
from pathlib import Path

import pytest

ENV_SH = Path(__file__).parents[1] / "scripts/env.sh"
BASH = shutil.which("bash")

PYTHON = """#!{bash}
[ "$1" = -c ] && exit 0
echo "$@" >> calls
exit $(cat pip_status)
"""


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text(PYTHON.format(bash=BASH))
    (tmp_path / "venv/bin/python").chmod(0o755)
    (tmp_path / "venv/bin/activate").write_text("echo activated\n")
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "requirements-dev.txt").write_text("-r requirements.txt\n")
    (tmp_path / "pip_status").write_text("0")
    return tmp_path


def source_env(project, requirements, **env):
    command = [BASH, "-c", f"set -euo pipefail; source {ENV_SH} {requirements}"]
    env = {"PATH": "/usr/bin:/bin", "VENV": "venv"} | env
    ran = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    calls = (project / "calls").read_text().splitlines() if (project / "calls").exists() else []
    return ran, len(calls)


def test_installs_only_what_changed(project):
    ran, calls = source_env(project, "requirements-dev.txt")
    assert (ran.returncode, calls) == (0, 1)
    assert ran.stdout.splitlines()[-1] == "activated"

    ran, calls = source_env(project, "requirements-dev.txt")
    assert (ran.returncode, ran.stdout, calls) == (0, "activated\n", 1)

    (project / "requirements.txt").write_text("torch>=2.11\n")  # included by the development file
    assert source_env(project, "requirements-dev.txt")[1] == 2
    assert source_env(project, "requirements.txt")[1] == 3
    assert source_env(project, "requirements-dev.txt")[1] == 3


def test_failed_installation_is_repeated(project):
    (project / "pip_status").write_text("1")
    ran, calls = source_env(project, "requirements.txt")
    assert (ran.returncode, calls) == (1, 1)
    assert "activated" not in ran.stdout
    (project / "pip_status").write_text("0")
    assert source_env(project, "requirements.txt")[1] == 2


def test_no_python(project):
    ran, _ = source_env(project, "requirements.txt", PATH="/nowhere", VENV="other")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: no Python 3.11 or newer found")
    assert ran.stderr.count("\n") == 1


def test_python_without_venv(project):
    (project / "bin").mkdir()
    (project / "bin/python3").write_text(f'#!{BASH}\n[[ "$2" != *ensurepip* ]]\n')
    (project / "bin/python3").chmod(0o755)
    ran, _ = source_env(project, "requirements.txt", PATH=str(project / "bin"), VENV="other")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: python3 has no venv module; install it")
    assert ran.stderr.count("\n") == 1
