"""Initial weights depend on the seed and the name of a parameter, and on nothing else."""

import pytest
import torch
from support import small_model
from torch import nn

from model.config import ModelConfig
from model.experts import RoutedExperts
from model.init import initialize
from model.recompute import Execution
from model.transformer import Transformer

torch.set_num_threads(1)


def make_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config)
    initialize(model, config, seed=seed)
    return model


def test_weights_do_not_depend_on_what_else_exists() -> None:
    small = make_model(small_model(num_nextn_predict_layers=0))
    torch.rand(3)  # the global generator has no part in it
    large = make_model(small_model(num_hidden_layers=5, n_routed_experts=12))
    for name, parameter in small.named_parameters():
        other = large.get_parameter(name)
        if ".experts." in name:
            assert torch.equal(parameter, other[:8]), name
        elif not name.endswith("gate.weight"):  # of another shape
            assert torch.equal(parameter, other), name


def test_a_part_alone_gets_the_weights_of_the_whole() -> None:
    config = small_model()
    whole = make_model(config)
    part = Transformer(config)
    part.layers = nn.ModuleDict({"2": part.layers["2"]})
    initialize(part, config, seed=0)
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_a_slice_of_the_experts_is_that_slice_of_the_whole() -> None:
    config = small_model()
    whole, part = make_model(config), Transformer(config)
    part.layers["1"].mlp.experts = RoutedExperts(config, 3, Execution())
    initialize(part, config, seed=0, first_expert=4)
    for name, parameter in part.layers["1"].mlp.experts.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(f"layers.1.mlp.experts.{name}")[4:7])


def test_seeds_names_and_experts_differ() -> None:
    model, other = make_model(small_model()), make_model(small_model(), seed=1)
    matrices = [(name, parameter) for name, parameter in model.named_parameters() if parameter.dim() > 1]
    for name, parameter in matrices:
        assert not torch.equal(parameter, other.get_parameter(name)), name
    firsts = [
        row.flatten()[:4] for _, parameter in matrices for row in (parameter if parameter.dim() == 3 else [parameter])
    ]
    assert len(torch.stack(firsts).unique(dim=0)) == len(firsts)


def test_distribution() -> None:
    model = make_model(small_model(initializer_range=0.006, hidden_size=128, moe_intermediate_size=64))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 4000:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.08), name
            assert abs(parameter.mean().item()) < 0.0006, name
    assert not torch.stack(list(model.expert_biases().values())).any()


def test_lower_precision_is_the_rounded_weight() -> None:
    config = small_model()
    low = Transformer(config).bfloat16()
    initialize(low, config, seed=0)
    for name, parameter in make_model(config).named_parameters():
        assert torch.equal(parameter.bfloat16(), low.get_parameter(name)), name
