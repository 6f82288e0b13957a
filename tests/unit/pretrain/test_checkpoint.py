"""Checkpoint folders: complete or absent, every damage named, any range readable from any layout."""

import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from support import small_model

from pretrain import checkpoint
from pretrain.checkpoint import (
    MANIFEST,
    CheckpointReader,
    CheckpointWriter,
    list_checkpoints,
    remove_old_checkpoints,
    step_folder,
)
from pretrain.errors import UserError
from pretrain.weights import write_weights

VALUES = torch.arange(100, dtype=torch.float32)


def write(folder: Path, cuts: list[int]) -> Path:
    """A checkpoint of one tensor of 100 elements, cut over ranks at `cuts`."""
    writer = CheckpointWriter(folder)
    writer.begin()
    files = {}
    bounds = [0, *cuts, len(VALUES)]
    for rank, (start, end) in enumerate(itertools.pairwise(bounds)):
        files |= writer.write_tensors(rank, {f"param/w@{start}": VALUES[start:end]})
    writer.commit(files=files, shapes={"w": (4, 25)}, state={"step": 3}, texts={"config.toml": b"[model]\n"})
    return folder


@pytest.mark.parametrize("cuts", [[], [50], [1, 2, 97], list(range(1, 100))])
def test_any_range_from_any_cut(tmp_path: Path, cuts: list[int]) -> None:
    reader = CheckpointReader(write(tmp_path / "c", cuts))
    reader.verify()
    choose = random.Random(0)
    for _ in range(50):
        start = choose.randrange(100)
        numel = choose.randint(1, 100 - start)
        assert torch.equal(reader.range("param/w", start, numel), VALUES[start : start + numel])
    assert torch.equal(reader.parameter("w"), VALUES.view(4, 25))
    assert reader.manifest.state == {"step": 3}
    assert reader.text("config.toml") == "[model]\n"


def test_missing_range_is_named(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "c")
    writer.begin()
    files = writer.write_tensors(0, {"param/w@0": VALUES[:40], "param/w@60": VALUES[60:]})
    writer.commit(files=files, shapes={"w": (100,)}, state={}, texts={})
    with pytest.raises(UserError, match="lacks elements 40 to 100 of param/w"):
        CheckpointReader(tmp_path / "c").range("param/w", 0, 100)
    with pytest.raises(UserError, match="of param/v"):
        CheckpointReader(tmp_path / "c").range("param/v", 0, 1)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", [33])
    choose = random.Random(1)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            damaged[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"damaged|lacks|manifest"):
                CheckpointReader(folder).verify()
        path.write_bytes(content)
    CheckpointReader(folder).verify()


def test_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", [33])
    path = folder / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"rank-00001\.safetensors does not match"):
        CheckpointReader(folder).verify()
    path.unlink()
    with pytest.raises(UserError, match=r"lacks rank-00001\.safetensors"):
        CheckpointReader(folder).verify()
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        CheckpointReader(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 1, "seal": ""}', "[" * 100_000, "\x80\x04K\x01."])
def test_hostile_manifest_is_refused(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path / "c", [])
    (folder / MANIFEST).write_text(content)
    with pytest.raises(UserError, match="manifest"):
        CheckpointReader(folder)


def test_names_outside_the_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", [])
    writer = CheckpointWriter(tmp_path / "d")
    writer.begin()
    files = writer.write_tensors(0, {"param/w@0": VALUES})
    writer.commit(files={"../c/rank-00000.safetensors": next(iter(files.values()))}, shapes={}, state={}, texts={})
    assert json.loads((folder / MANIFEST).read_text())
    with pytest.raises(UserError, match="not a file of its own folder"):
        CheckpointReader(tmp_path / "d")


def test_unfinished_saves_are_absent_and_old_ones_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(step_folder(tmp_path, step), [])
    CheckpointWriter(step_folder(tmp_path, 11)).begin()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{n:08d}" for n in (1, 2, 3, 10)]
    remove_old_checkpoints(tmp_path, keep=0)
    assert len(list_checkpoints(tmp_path)) == 4
    remove_old_checkpoints(tmp_path, keep=2)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000003", "step-00000010"]


def test_a_removal_that_is_killed_leaves_no_checkpoint_and_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    for step in (1, 2):
        write(step_folder(tmp_path, step), [])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_old_checkpoints(tmp_path, keep=1)
        with pytest.raises(KeyboardInterrupt):
            write(step_folder(tmp_path, 2), [])
    assert list_checkpoints(tmp_path) == []
    write(step_folder(tmp_path, 2), [])
    remove_old_checkpoints(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_checkpoint_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", [33, 66])
    assert write(folder, []) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert not (folder / "rank-00002.safetensors").exists()
    CheckpointReader(folder).verify()


def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"rank-00000\.safetensors cannot be written: No space left"):
        write(tmp_path / "c", [])


def test_checkpoints_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    write(step_folder(tmp_path, 1), [])
    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(UserError, match=f"the checkpoints in {tmp_path}/checkpoints cannot be read: .*Permission"):
        list_checkpoints(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(UserError, match=r"step-00000001 cannot be read: .*Permission"):
        CheckpointReader(step_folder(tmp_path, 1))


def import_into(out: Path, tensors: Iterable[tuple[str, torch.Tensor]] = (("w", VALUES),)) -> None:
    write_weights(out, small_model(), tensors, context_length=8, eos=None, tokenizer_file=None)


def test_weights_touch_nothing_that_is_there(tmp_path: Path) -> None:
    mine = {f"{name}.partial{pid}" for name in ("out", "other") for pid in ("", f"-{os.getpid()}")}
    for name in mine - {f"out.partial-{os.getpid()}"}:
        (tmp_path / name).mkdir()
    import_into(tmp_path / "out")
    (tmp_path / f"out.partial-{os.getpid()}").mkdir()
    with pytest.raises(UserError, match="other cannot be written"):
        import_into(tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *mine}
    with pytest.raises(UserError, match="out exists; name a new folder"):
        import_into(tmp_path / "out")


def test_weights_that_fail_leave_nothing_behind(tmp_path: Path) -> None:
    def damaged() -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", VALUES
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        import_into(tmp_path / "out", damaged())
    assert list(tmp_path.iterdir()) == []


def test_weights_below_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out cannot be written: .*Not a directory"):
        import_into(tmp_path / "file" / "out")
