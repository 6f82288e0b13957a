"""Checkpoint folders: complete or absent, every damage named, any range readable from any layout."""

import errno
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import small_model

from pretrain.checkpoints import checkpoint
from pretrain.checkpoints.checkpoint import (
    MANIFEST,
    CheckpointReader,
    CheckpointWriter,
    DamagedError,
    list_checkpoints,
    list_damaged,
    put_back_replaced,
    remove_old_checkpoints,
    set_aside,
    step_folder,
)
from pretrain.checkpoints.tensor_files import check_tensor, read_elements, read_header, write_tensor_file
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
    writer.commit(files=files, shapes={"w": (4, 25)}, state={"tokens": 3}, texts={"config.toml": b"[model]\n"})
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
    assert reader.manifest.state == {"tokens": 3}
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
    with pytest.raises(UserError, match=r"rank-00001\.safetensors has [0-9,]+ bytes instead of"):
        CheckpointReader(folder).verify()
    path.unlink()
    with pytest.raises(UserError, match=r"rank-00001\.safetensors is missing"):
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
    assert list_checkpoints(tmp_path) == [step_folder(tmp_path, 2)]
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
    def full(descriptor: int, content: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "c", [])


def test_files_are_safetensors(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float16, torch.bool)
    tensors = {f"kind/{dtype}@0": torch.arange(7).to(dtype) for dtype in dtypes}
    tensors |= {"none@0": torch.empty(0), "large@0": torch.arange(1_000_003, dtype=torch.int16).view(-1, 1)}
    tensors |= {"strided@0": torch.arange(100.0)[::3]}
    size, header = write_tensor_file(tmp_path / "t.safetensors", tensors)
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    stored = {entry.key: entry for entry in read_header(tmp_path / "t.safetensors", size, header)}
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor), key
        check_tensor(tmp_path / "t.safetensors", stored[key])
        out = torch.empty(tensor.numel(), dtype=tensor.dtype)
        read_elements(tmp_path / "t.safetensors", stored[key], 0, out)
        assert torch.equal(out, tensor.flatten())


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "c")
    writer.begin()
    files = writer.write_tensors(0, {"param/v@0": VALUES, "param/w@0": VALUES + 1, "rng/cpu.0@0": VALUES + 2})
    writer.commit(files=files, shapes={}, state={}, texts={})
    path = tmp_path / "c" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-500] ^= 4
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors is damaged in param/w@0, which does not match"):
        CheckpointReader(tmp_path / "c").verify()
    content[100] ^= 4
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors has a header that does not match its checksum"):
        CheckpointReader(tmp_path / "c").verify()


def test_every_part_is_verified_by_some_rank(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", [10, 20, 30, 40, 50])
    path = folder / "rank-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for num_parts in (1, 2, 3, 7, 20):
        found = 0
        for part in range(num_parts):
            try:
                CheckpointReader(folder).verify(part, num_parts)
            except DamagedError:
                found += 1
        assert found == 1


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", [50])
    path = folder / "rank-00001.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedError, match=r"rank-00001\.safetensors is not a file"):
        CheckpointReader(folder).verify()
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
        CheckpointReader(folder)


def test_damaged_ones_are_set_aside_and_never_removed(tmp_path: Path) -> None:
    for _ in range(3):
        set_aside(write(step_folder(tmp_path, 7), []))
    write(step_folder(tmp_path, 8), [])
    remove_old_checkpoints(tmp_path, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000008"]
    names = [path.name for path in list_damaged(tmp_path)]
    assert names == ["step-00000007.damaged", "step-00000007.damaged-2", "step-00000007.damaged-3"]


def test_every_nth_is_kept_for_good(tmp_path: Path) -> None:
    for step in range(5, 65, 5):
        write(step_folder(tmp_path, step), [])
        remove_old_checkpoints(tmp_path, keep=2, keep_every=20)
    names = [int(path.name[5:]) for path in list_checkpoints(tmp_path)]
    assert names == [20, 40, 55, 60]


def test_a_replacement_that_is_killed_leaves_one_of_the_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename
    folder = write(step_folder(tmp_path, 1), [])

    def killed(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write(folder, [50])
    assert list_checkpoints(tmp_path) == []
    put_back_replaced(tmp_path)
    assert list_checkpoints(tmp_path) == [folder]
    CheckpointReader(folder).verify()
    write(folder, [50])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "rank-00001.safetensors").exists()


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
