"""torchrun on a single machine starts all ranks again when one is lost, and they go on from the last save."""

import time
from pathlib import Path

import psutil
from support import finish, read_metrics, start_training, write_run

from pretrain.checkpoints.checkpoint import step_folder


def test_torchrun_restarts_a_lost_worker(tmp_path: Path) -> None:
    config = write_run(tmp_path, hidden_size=128, intermediate_size=256)
    finish(start_training(config, "run.name=straight", processes=2))
    launcher = start_training(config, "run.name=restarted", processes=2, launcher_options=("--max-restarts", "3"))
    run = tmp_path / "restarted"
    while not (run / "metrics.jsonl").is_file():
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.01)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    victim = next(worker for worker in workers if worker.environ().get("RANK") == "1")
    while not step_folder(run, 5).is_dir():
        time.sleep(0.001)
    victim.kill()
    output = finish(launcher)
    assert output.count("resumed after step") == 1
    assert "Traceback" not in output
    keys = ("step", "tokens", "loss", "grad_norm", "data_position")
    restarted, straight = (
        [[line[key] for key in keys] for line in read_metrics(path)] for path in (run, tmp_path / "straight")
    )
    assert restarted == straight
