"""slurm/submit.sh alone, with a stand-in for sbatch: what it hands on, word for word, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROJECT, write_run

SBATCH = """#!/bin/bash
[[ $1 == --parsable ]] || exit 9
for word; do printf '%s\\n' "$word"; done >> "{folder}/words"
[[ ! -e "{folder}/refuses" ]] || {{ echo "sbatch: error: invalid partition" >&2; exit 1; }}
n=$(cat "{folder}/number" 2>/dev/null || echo 40)
echo $((n + 1)) | tee "{folder}/number"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration, an sbatch and an environment file, all in `tmp_path`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH.format(folder=tmp_path))
    (programs / "sbatch").chmod(0o755)
    (tmp_path / "environment.sh").write_text(f"PYTHON={sys.executable}\n")
    return write_run(tmp_path)


def submit(config: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folder = config.parent
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        [PROJECT / "slurm" / "submit.sh", *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path, "EVA_ENVIRONMENT": str(folder / "environment.sh"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_word_arrives_as_it_is(config: Path) -> None:
    name = "$(touch hacked); `touch hacked` 'x' \"y\" %j *"
    settings = ["--set", f"run.name={name}", "--set=model.vocab_size=96"]
    done = submit(config, "run.toml", "-N", "2", "--comment=a b; touch hacked", "--", *settings)
    assert done.returncode == 0, done.stderr
    run = config.parent / name
    assert done.stdout == f"job 41\nrun {run}\n"
    slurm = PROJECT / "slurm"
    assert (config.parent / "words").read_text().splitlines() == [
        "--parsable",
        f"--job-name={name}",
        f"--output={str(run).replace('%', '%%')}/slurm/%j.log",
        "-N",
        "2",
        "--comment=a b; touch hacked",
        str(slurm / "train.sbatch"),
        str(slurm),
        str(run),
        str(config),
        *settings,
    ]
    assert (run / "slurm").is_dir()
    assert not (config.parent / "hacked").exists()


def test_chain_of_an_array(config: Path) -> None:
    done = submit(config, "run.toml", "--chain", "3", "--array", "1-2", "--dependency=afterok:7")
    assert done.stdout == f"job 41 42 43\nrun {config.parent / 'small'}\n", done.stderr
    words = (config.parent / "words").read_text().splitlines()
    assert [word for word in words if word.startswith("--dependency")] == [
        *["--dependency=afterok:7"],
        *["--dependency=afterok:7", "--dependency=afterany:41"],
        *["--dependency=afterok:7", "--dependency=afterany:41", "--dependency=afterany:42"],
    ]
    assert words.count(f"--output={config.parent / 'small'}/slurm/%A_%a.log") == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "usage: submit.sh CONFIG.toml"),
        (["none.toml"], "no configuration at none.toml"),
        (["--nodes=1", "run.toml"], "usage: submit.sh CONFIG.toml"),
        (["run.toml", "other.toml"], "other.toml is no option"),
        (["run.toml", "--nodes=2", "2"], "2 is no option"),
        (["run.toml", "--set", "train.steps=1"], "--set belongs behind --"),
        (["run.toml", "--chdir=/"], "cd there and submit"),
        (["run.toml", "--ntasks=4"], "use --nodes and --ntasks-per-node"),
        (["run.toml", "--chain", "no"], "--chain no must be a number of jobs"),
        (["run.toml", "--chain"], "--chain  must be a number of jobs"),
        (["run.toml", "--", "train.steps=1"], "train.steps=1: behind -- come --set KEY=VALUE"),
        (["run.toml", "--", "--set"], "--set: behind -- come --set KEY=VALUE"),
        (["run.toml", "--array=1-2", "--", "--set", "run.seed=3"], "--array sets run.seed"),
        (["run.toml", "--", "--set", "train.stepps=1"], "did you mean 'steps'?"),
        (["run.toml", "--", "--set", "run.name=a/b"], "must be a plain folder name"),
    ],
)
def test_refused_with_one_message(config: Path, arguments: list[str], reason: str) -> None:
    done = submit(config, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("submit.sh: ")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (config.parent / "words").exists()


def test_refused_where_something_is_missing(config: Path) -> None:
    (config.parent / "bin" / "sbatch").rename(config.parent / "bin" / "other")
    done = submit(config, "run.toml", PATH="/usr/bin:/bin" if not Path("/usr/bin/sbatch").exists() else hidden(config))
    assert (done.returncode, done.stderr) == (2, "submit.sh: no sbatch here; submit where Slurm is installed\n")
    (config.parent / "bin" / "other").rename(config.parent / "bin" / "sbatch")
    done = submit(config, "run.toml", EVA_ENVIRONMENT="/none.sh")
    assert (done.returncode, done.stderr) == (2, "submit.sh: no environment file at EVA_ENVIRONMENT = /none.sh\n")
    (config.parent / "refuses").touch()
    done = submit(config, "run.toml")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "sbatch: error: invalid partition",
        "submit.sh: sbatch refused, as said above; submitted so far: none",
    ]


def hidden(config: Path) -> str:
    """A PATH with what the script needs, and no sbatch."""
    programs = config.parent / "few"
    programs.mkdir()
    for name in ("bash", "dirname", "realpath", "env"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    return str(programs)
