"""One cluster for all tests of this folder; without Slurm they are skipped."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import NoSlurmError, SlurmCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    folder = Path(tempfile.mkdtemp(prefix="eva-slurm-", dir="/tmp"))
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    except NoSlurmError as error:
        pytest.skip(f"needs a Slurm: {error}")
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
