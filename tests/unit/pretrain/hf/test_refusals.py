"""Folders that are not what they claim, and exports that must not be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_support import (
    edit_json,
    edit_tensors,
    export,
    random_config,
    random_model,
)
from safetensors.torch import load_file, save_file

from pretrain.hf.folder import HFError, export_folder, import_folder

torch.set_num_threads(1)


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    model = random_model(random_config(0))

    def interrupted():
        yield from list(model.state_dict().items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_folder(
            model.config, interrupted(), tmp_path / "out", dtype=None, max_position_embeddings=64, eos_token_id=1
        )
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_folder_in_use(tmp_path: Path) -> None:
    model = random_model(random_config(0))
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty")
    with pytest.raises(HFError, match="exists and is not an empty folder"):
        export(model, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(HFError, match="exists and is not an empty folder"):
        export(model, tmp_path / "file")
    with pytest.raises(HFError, match="cannot write"):
        export(model, tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), r"tensor norm.weight is missing"),
        (lambda t: t.update({"norm.wait": torch.ones(27)}), r"tensor norm.wait of shape \[27\]: it is unknown"),
        (lambda t: t.update({"norm.weight": torch.ones(26)}), r"norm.weight of shape \[26\]: it belongs with .*\[27\]"),
        (lambda t: t.update({"norm.weight": torch.ones(27).half()}), r"norm.weight of torch.float16: it must be"),
    ],
)
def test_export_refuses_other_tensors(change, message: str, tmp_path: Path) -> None:
    model = random_model(random_config(0))
    tensors = dict(model.state_dict())
    change(tensors)
    with pytest.raises(HFError, match=message):
        export_folder(
            model.config, tensors.items(), tmp_path / "out", dtype=None, max_position_embeddings=64, eos_token_id=1
        )
    assert not list(tmp_path.iterdir())


def with_index(**places: str):
    """Turns the single file into one with an index, and lies in it."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        weight_map = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors") | places
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def duplicate(folder: Path) -> None:
    with_index(**{"model.norm.weight": "0.safetensors"})(folder)
    save_file({"model.norm.weight": torch.ones(27)}, folder / "0.safetensors")


UP_PROJ = "model.layers.0.mlp.experts.1.up_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_tensors(lambda t: t.pop("model.norm.weight")), r"tensor model\.norm\.weight is missing"),
        (edit_tensors(lambda t: t.pop(UP_PROJ)), r"tensor .*experts\.1\.up_proj\.weight is missing"),
        (edit_tensors(lambda t: t.pop("model.layers.1.eh_proj.weight")), r"layers\.1\.eh_proj\.weight is missing"),
        (edit_tensors(lambda t: t.update(extra=torch.ones(1), other=torch.ones(1))), r"tensor extra \(and 1 more\)"),
        (edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(26)})), r"norm.* \[26\].*asks for \[27\]"),
        (edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(27).half()})), r"norm\.weight .*dtype F16"),
        (edit_tensors(lambda t: t.update({O_PROJ: t[O_PROJ].to(torch.float8_e4m3fn)})), r"no quantization_config"),
        (
            edit_tensors(lambda t: t.update({"model.layers.1.embed_tokens.weight": torch.zeros(101, 27)})),
            r"layers\.1\.embed_tokens\.weight differs from model\.embed_tokens\.weight",
        ),
        (truncate, r"model\.safetensors is damaged"),
        (only_pickles, r"neither model\.safetensors nor .*pickled weights are never read"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds neither model\.safetensors nor"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), r"config\.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json must hold a JSON object"),
        (edit_json("config.json", lambda c: c.update(max_position_embeddings="far")), r"_embeddings = 'far'"),
        (edit_json("config.json", lambda c: c.update(eos_token_id=[])), r"eos_token_id = \[\]"),
        (edit_json("config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})), r"only quant"),
        (with_index(x="../secret.safetensors"), r"names '\.\./secret\.safetensors', which is not .* its own folder"),
        (with_index(x="/etc/passwd"), r"names '/etc/passwd'"),
        (with_index(x="config.json"), r"names 'config\.json', which is not a safetensors file"),
        (with_index(x="b.safetensors"), r"names b\.safetensors, which is missing"),
        (with_index(x="a.safetensors"), r"has tensor x in a\.safetensors, it is in none"),
        (duplicate, r"has tensor model\.norm\.weight in 0\.safetensors, it is in a\.safetensors"),
        (
            lambda folder: (with_index()(folder), (folder / "model.safetensors.index.json").write_text('{"a": 1}')),
            r"weight_map must map",
        ),
    ],
)  # fmt: skip
def test_import_refuses_a_folder_that_is_not_what_it_claims(edit, message: str, tmp_path: Path) -> None:
    config = replace(random_config(0), num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=1)
    folder = export(random_model(config), tmp_path / "out")
    dict(import_folder(folder).tensors)
    edit(folder)
    with pytest.raises(HFError, match=message):
        dict(import_folder(folder).tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{O_PROJ}_scale_inv"), r"o_proj\.weight_scale_inv is missing, the scales"),
        (lambda t: t.update({f"{O_PROJ}_scale_inv": torch.ones(2, 1)}), r"F32 \[2, 1\]; it must be F32 \[1, 1\]"),
        (lambda t: t.update({f"{O_PROJ}_scale_inv": torch.ones(1, 1).half()}), r"scale_inv is F16"),
        (lambda t: t.update({O_PROJ: t[O_PROJ].bfloat16()}), r"unexpected tensor .*o_proj\.weight_scale_inv"),
        (lambda t: t.update({"model.norm.weight": torch.ones(27).to(torch.float8_e4m3fn)}), r"only for matrices"),
    ],
)  # fmt: skip
def test_import_refuses_wrong_scales(change, message: str, tmp_path: Path) -> None:
    folder = export(random_model(random_config(0)), tmp_path / "out", "fp8")
    edit_tensors(change)(folder)
    with pytest.raises(HFError, match=message):
        import_folder(folder)


def test_softmax_gates_cannot_be_exported(tmp_path: Path) -> None:
    model = random_model(replace(random_config(0), scoring_func="softmax"))
    with pytest.raises(HFError, match=r"model\.scoring_func = 'softmax' cannot be exported"):
        export(model, tmp_path / "out")
