"""What `pip install .` puts elsewhere works from any folder, without the checkout."""

import os
import subprocess
import sys
from pathlib import Path

from support import PROJECT


def test_installed_packages_run_from_an_empty_folder(tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(PROJECT)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for package in ("data", "pretrain"):
        where = [sys.executable, "-c", f"import {package}; print({package}.__file__)"]
        found = subprocess.run(where, cwd=empty, env=environment, check=True, capture_output=True, text=True).stdout
        assert found.startswith(str(site))
        command = [sys.executable, "-m", package, "--help"]
        shown = subprocess.run(command, cwd=empty, env=environment, check=True, capture_output=True, text=True).stdout
        assert "example" in shown
    for package in ("model", "parallel", "data", "pretrain"):
        modules = {path.relative_to(PROJECT) for path in (PROJECT / package).rglob("*.py")}
        assert modules == {path.relative_to(site) for path in (site / package).rglob("*.py")}
    command = [sys.executable, "-m", "pretrain", "plan", str(PROJECT / "configs" / "small.toml")]
    shown = subprocess.run(command, cwd=empty, env=environment, check=True, capture_output=True, text=True).stdout
    assert "Predicted on H100" in shown
