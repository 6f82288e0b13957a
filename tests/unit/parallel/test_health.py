"""Who must not take part, judged from planted facts."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import parallel.health
from parallel.health import Facts, Finding, is_exact, judge_health, minority, probe

CPU = torch.device("cpu")


def facts(count: int, **changed: Any) -> list[Facts]:
    """Healthy ranks, the last of them changed."""
    everyone = [
        Facts(
            rank=rank,
            host=f"node{rank // 2}",
            device="a device",
            exact=True,
            repeats=True,
            bits=7,
            wrong_groups=(),
            wrong_carriers=(),
            clock=1000.0 + rank,
            versions={"torch": "2.11"},
            config="c",
            free_bytes=100,
        )
        for rank in range(count)
    ]
    everyone[-1] = replace(everyone[-1], **changed)
    return everyone


@pytest.mark.parametrize("count", [1, 2, 8])
def test_healthy_ranks_are_left_alone(count: int) -> None:
    assert judge_health(facts(count)) == []


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"exact": False}, "products of whole numbers come out wrong on its a device"),
        ({"repeats": False}, "the same product gives other bits when repeated on its a device"),
        ({"bits": 8}, "the same product gives other bits on its a device than on those of others"),
        ({"wrong_groups": ("replicas", "model")}, "a sum over its replicas, model ranks came out wrong"),
        ({"wrong_carriers": ("copy engines",)}, "copy engines bring it other rows than were sent"),
        ({"clock": 1060.0}, "its clock is +58 s off, more than 30 s"),
        ({"versions": {"torch": "2.13"}}, "it has torch 2.13, where most have 2.11"),
    ],
    ids=str,
)
def test_a_fault_is_found_on_its_rank_alone(changed: dict[str, Any], what: str) -> None:
    assert judge_health(facts(4, **changed)) == [Finding(3, "node1", what)]


def test_a_package_that_a_rank_does_not_import_is_no_fault() -> None:
    assert judge_health(facts(4, versions={"rich": "14"})) == []
    versions = parallel.health._versions()
    assert versions["torch"] == torch.__version__
    assert "python" in versions


def test_other_devices_may_give_other_bits() -> None:
    assert judge_health(facts(4, bits=8, device="another device")) == []


def test_without_a_majority_all_are_named() -> None:
    assert [finding.rank for finding in judge_health(facts(2, bits=8))] == [0, 1]
    others, usual = minority(facts(2, config="d"), lambda fact: fact.config)
    assert (len(others), usual) == (2, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_machine_computes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    assert is_exact(CPU, dtype)
    assert probe(CPU, dtype) == probe(CPU, dtype)
    are_equal = torch.equal
    monkeypatch.setattr(parallel.health.torch, "equal", lambda product, expected: are_equal(product + 1, expected))
    assert not is_exact(CPU, dtype)
