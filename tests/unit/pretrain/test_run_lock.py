"""Two runs in one folder: the second is told who has it, and gets it when the first has ended, however it ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PROJECT

from pretrain.errors import UserError
from pretrain.run_lock import LOCK, holding

HOLDER = """
import sys, time
from pathlib import Path
from pretrain.run_lock import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_told_who_has_the_folder(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    refused = pytest.raises(UserError, match=rf"in use by process {holder.pid} on .*; wait for that run or stop it")
    with refused, holding(tmp_path, patience_s=0.3):
        pass


def test_a_killed_run_leaves_the_folder_free(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.send_signal(signal.SIGKILL)
    with holding(tmp_path, patience_s=10):
        assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
    with holding(tmp_path, patience_s=0):
        pass
