"""What a configuration means for FP8, and what the log says."""

import importlib.util

import pytest
import torch
from support import PROJECT

from model.te import reason_against
from pretrain.config import Config, load_config
from pretrain.errors import UserError
from pretrain.fp8 import check_fp8, describe_fp8, fp8_config, monitors_fp8


def config(*overrides: str, name: str = "tiny") -> Config:
    return load_config(PROJECT / f"configs/{name}.toml", overrides)


def test_a_configuration_says_how_products_are_rounded() -> None:
    fp8 = fp8_config(config("precision.fp8=current", "precision.fp8_power_of_two=false"), "cpu")
    assert (fp8.recipe, fp8.power_of_two, fp8.keeps_weights) == ("current", False, True)
    assert fp8.parts == {"attention", "mlp", "experts"}
    assert fp8_config(config(), "cuda").recipe == "off"
    assert not fp8_config(config("parallel.zero_stage=3"), "cuda").keeps_weights


@pytest.mark.parametrize(
    ("name", "device", "high"),
    [
        ("tiny", "cpu", "; in fp32: self_attn.kv_a_proj_with_mqa"),
        ("dsv3_2b", "cpu", ""),
        ("dsv3_671b", "cpu", ""),
    ],
)
def test_the_log_says_what_is_in_fp8_and_what_is_not(name: str, device: str, high: str) -> None:
    run = config("precision.fp8=block", name=name)
    line = describe_fp8(run, fp8_config(run, device))
    assert line.startswith("fp8 = block: self_attn.q_")
    assert line.endswith(f"mlp.shared_experts.gate_up_proj, mlp.shared_experts.down_proj{high}")
    everywhere = config("precision.fp8=block", "precision.fp8_everywhere=true", name=name)
    assert describe_fp8(everywhere, fp8_config(everywhere, "cuda")) == line


def test_on_a_gpu_products_are_in_fp8_that_gain_by_it() -> None:
    expected = {
        "small": "fp8 = block: nothing; in bf16: self_attn.q_proj, ",
        "dsv3_2b": "fp8 = block: mlp.gate_up_proj, mlp.down_proj; in bf16: self_attn.q_proj, ",
        "dsv3_671b": "fp8 = block: self_attn.o_proj, mlp.gate_up_proj, mlp.down_proj, mlp.shared_experts.gate_up",
    }
    for name, line in expected.items():
        run = config("precision.fp8=block", name=name)
        found = describe_fp8(run, fp8_config(run, "cuda"))
        assert found.startswith(line)
        assert found.endswith("mlp.shared_experts.down_proj")


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["precision.fp8=block"], [100, 200]),
        (["precision.fp8=block", "logging.fp8_every=0"], []),
        (["precision.fp8=block", "logging.fp8_every=90"], [90, 180]),
        ([], []),
    ],
)
def test_steps_that_are_watched(overrides: list[str], steps: list[int]) -> None:
    run = config(*overrides)
    assert [step for step in range(1, 201) if monitors_fp8(run, step)] == steps


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is here")
def test_a_gpu_without_transformer_engine_is_refused() -> None:
    run = config("precision.fp8=block")
    check_fp8(run, torch.device("cpu"))
    check_fp8(config(), torch.device("cuda"))
    with pytest.raises(UserError, match=r'precision\.fp8 = "block" is not possible here: Transformer Engine cannot be'):
        check_fp8(run, torch.device("cuda"))


def test_a_gpu_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        can_do = can_do_blocks = staticmethod(lambda: (False, "it is too old."))

    monkeypatch.setattr("model.te._load", Engine)
    assert reason_against("block") == reason_against("current") == "it is too old"
