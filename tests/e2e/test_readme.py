"""Every command of the README runs as it is written, on small configurations under the same names."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from support import PROJECT, SMALL_RUN, small_model_toml

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
TESTED_ELSEWHERE = {"make demo", "make test"}  # CI runs both


def readme_commands() -> list[str]:
    blocks = BLOCK.findall((PROJECT / "README.md").read_text())
    lines = [line.partition(" # ")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line not in TESTED_ELSEWHERE]


def test_commands_in_order(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    config = SMALL_RUN.format(folder="runs", model=small_model_toml(vocab_size=4096))
    # Enough sequences for eight ranks.
    config = config.replace('dtype = "fp32"', 'dtype = "bf16"')
    for few, more in (("start = 4", "start = 16"), ("value = 12", "value = 32"), ("multiple = 4", "multiple = 16")):
        config = config.replace(few, more)
    (tmp_path / "configs" / "small.toml").write_text(config)
    texts = tmp_path / "texts"
    texts.mkdir()
    for path in sorted(Path(os.__file__).parent.glob("[a-c]*.py")):
        (texts / path.name).write_text(path.read_text())

    commands = readme_commands()
    assert len(commands) >= 10
    for line in commands:
        words = shlex.split(line)
        launchers = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
        # Two cores stand for eight GPUs.
        words = ["2" if word == "8" and words[0] == "torchrun" else word for word in words]
        done = subprocess.run(
            [*launchers[words[0]], *words[1:]],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
