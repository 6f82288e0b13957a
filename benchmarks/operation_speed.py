"""Attention and experts of a layer beside their alternatives, on one GPU, in one run.

    python benchmarks/operation_speed.py                          # the shapes of configs/dsv3_2b.toml
    python benchmarks/operation_speed.py --device cpu --small     # that it runs at all

attention    causal, heads of 192 and 128: as the model calls it, each backend of torch, FlashAttention 4 if installed
experts      tokens to experts and back, forward and backward: the model's path in bf16 and in block FP8, beside
             `index_select`, `torch._grouped_mm` and a plain SwiGLU, which autograd differentiates
products     one grouped product of 64 experts, 2048 × 2816, of 65536 rows: bf16 beside block FP8, rounding included

Times are medians of interleaved rounds, in which every side has warmed up; TFLOP/s are of the products alone. Results
are compared with the first side's: the largest difference, relative to the largest value.
"""

import argparse
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from model import flash
from model.config import ModelConfig
from model.experts import RoutedExperts, RoutedRows
from model.fp8 import Fp8, Fp8Config
from model.recompute import Execution
from model.rope import softmax_scale

SLEEP_CYCLES = 2_000_000
HEADS, KEY_DIM, VALUE_DIM = 16, 192, 128
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Sizes(NamedTuple):
    """Sequences of a length, and of the experts: how many, how many of each token, hidden and inner size."""

    batch: int = 8
    seq_len: int = 4096
    experts: int = 64
    chosen: int = 6
    hidden: int = 2048
    inner: int = 1024


Work = Callable[[], list[Tensor]]
"""A pass forward and backward; gives results and gradients."""


class Clock:
    """Times work on a device."""

    def __init__(self, device: str, rounds: int) -> None:
        self._device, self._rounds = device, rounds

    def table(self, title: str, sides: dict[str, Work], flops: float) -> None:
        """Prints a row for each side; those that cannot run say why."""
        print(f"\n### {title}\n")
        print("| side | ms | first side / it | TFLOP/s | difference | kernels |\n|---|---|---|---|---|---|")
        expected: list[Tensor] = []
        able: dict[str, Work] = {}
        notes: dict[str, str] = {}
        for name, work in sides.items():
            try:
                found = work()
            except (RuntimeError, ImportError, NotImplementedError, AssertionError) as error:
                print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:90]} | | | | |")
                continue
            expected = expected or found
            pairs = zip(found, expected, strict=True)
            worst = max(
                float((a.detach().float() - b.detach().float()).abs().max() / b.detach().float().abs().max())
                for a, b in pairs
            )
            notes[name] = f"{worst:.0e} | {self._kernels(work)}"
            able[name] = work
        times: dict[str, list[float]] = {name: [] for name in able}
        for number in range(self._rounds + 2):
            for name, work in able.items():
                taken = self._milliseconds(work)
                if number > 1:
                    times[name].append(taken)
        first = median(next(iter(times.values())))
        for name, taken in times.items():
            middle = median(taken)
            print(f"| {name} | {middle:.3f} | {first / middle:.2f} | {flops / middle / 1e9:.0f} | {notes[name]} |")

    def _milliseconds(self, work: Work) -> float:
        if self._device == "cpu":
            began = perf_counter()
            work()
            return 1000 * (perf_counter() - began)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # In a step the host is ahead of the device, so launching costs nothing.
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _kernels(self, work: Work) -> str:
        """The two that take longest."""
        if self._device == "cpu":
            return ""
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            work()
            torch.cuda.synchronize()
        events = sorted(record.key_averages(), key=lambda event: -event.device_time_total)
        return ", ".join(f"`{event.key[:40]}`" for event in events[:2])


def leaves(*sizes: tuple[int, ...], device: str) -> list[Tensor]:
    return [torch.randn(size, device=device, dtype=torch.bfloat16).requires_grad_() for size in sizes]


def attention(clock: Clock, sizes: Sizes, device: str) -> None:
    shape = sizes.batch, sizes.seq_len, HEADS
    q, k, v = leaves((*shape, KEY_DIM), (*shape, KEY_DIM), (*shape, VALUE_DIM), device=device)
    grad = torch.randn(*shape, VALUE_DIM, device=device, dtype=torch.bfloat16)
    scale = softmax_scale(KEY_DIM, None)

    def in_torch() -> Tensor:
        heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale).transpose(1, 2)

    def in_model() -> Tensor:
        return flash.attend(q, k, v, scale) if flash.can_attend(q, v) else in_torch()

    def passes(forward: Callable[[], Tensor]) -> Work:
        def work() -> list[Tensor]:
            out = forward()
            return [out, *torch.autograd.grad(out, (q, k, v), grad)]

        return work

    def of_backend(backend: SDPBackend) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return in_torch()

        return forward

    sides = {"as the model calls it": passes(in_model), "torch": passes(in_torch)}
    sides |= {name: passes(of_backend(backend)) for name, backend in BACKENDS.items()}
    if find_spec("flash_attn") is not None:
        from flash_attn.cute import flash_attn_func

        for name, repeats in (("FlashAttention 4", False), ("FlashAttention 4, deterministic", True)):

            def by_flash(repeats: bool = repeats) -> Tensor:
                return flash_attn_func(q, k, v, softmax_scale=scale, causal=True, deterministic=repeats)[0]

            sides[name] = passes(by_flash)
    pairs = sizes.batch * HEADS * sizes.seq_len**2 / 2
    clock.table("Attention, forward and backward", sides, 2 * pairs * (4 * KEY_DIM + 3 * VALUE_DIM))


def experts(clock: Clock, sizes: Sizes, device: str) -> None:
    tokens = sizes.batch * sizes.seq_len
    config = ModelConfig(
        vocab_size=256,
        hidden_size=sizes.hidden,
        num_hidden_layers=1,
        num_attention_heads=1,
        kv_lora_rank=128,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=sizes.inner,
        moe_intermediate_size=sizes.inner,
        n_routed_experts=sizes.experts,
        n_shared_experts=0,
        num_experts_per_tok=sizes.chosen,
    )
    (x,) = leaves((tokens, sizes.hidden), device=device)
    grad = torch.randn_like(x)
    choices = torch.rand(tokens, sizes.experts, device=device).topk(sizes.chosen).indices
    weights = torch.rand(tokens, sizes.chosen, device=device).requires_grad_()
    plain, rounded = (
        RoutedExperts(config, sizes.experts, Execution(fp8=Fp8(Fp8Config(recipe=recipe))))
        .to(device, torch.bfloat16)
        for recipe in ("off", "block")
    )  # fmt: skip
    with torch.no_grad():
        for ours, theirs in zip(plain.parameters(), rounded.parameters(), strict=True):
            theirs.copy_(ours.normal_(std=0.02))

    def gradients(out: Tensor, module: RoutedExperts) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, (x, weights, *module.parameters()), grad)]

    def reference() -> list[Tensor]:
        order = choices.flatten().argsort(stable=True)
        offsets = torch.bincount(choices.flatten(), minlength=sizes.experts).cumsum(0).int()
        rows = x.index_select(0, order // sizes.chosen)
        gate, up = torch._grouped_mm(rows, plain.gate_up_proj.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
        results = torch._grouped_mm(F.silu(gate) * up, plain.down_proj.transpose(1, 2), offs=offsets)
        weighted = results * weights.flatten().index_select(0, order).unsqueeze(-1)
        out = torch.zeros_like(x, dtype=torch.float32).index_add(0, order // sizes.chosen, weighted.float())
        return gradients(out.to(x.dtype), plain)

    def of(module: RoutedExperts) -> Work:
        return lambda: gradients(module(RoutedRows(x, choices, weights)), module)

    sides = {"index_select, grouped_mm, SwiGLU, index_add": reference, "the model's, bf16": of(plain)}
    sides["the model's, block FP8"] = of(rounded)
    clock.table(
        f"Experts, {tokens * sizes.chosen} rows, forward and backward",
        sides,
        3 * 2 * tokens * sizes.chosen * 3 * sizes.hidden * sizes.inner,
    )


def products(clock: Clock, sizes: Sizes, device: str) -> None:
    rows, size, width = (65536, 2048, 2816) if sizes.hidden >= 2048 else (512, 128, 256)
    x = torch.randn(rows, size, device=device, dtype=torch.bfloat16)
    weight = 0.02 * torch.randn(sizes.experts, width, size, device=device, dtype=torch.bfloat16)
    counts = torch.bincount(torch.randint(sizes.experts, (rows,), device=device), minlength=sizes.experts)
    every = torch.arange(rows, device=device)

    def plain() -> list[Tensor]:
        return [torch._grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).int())]

    def in_fp8() -> list[Tensor]:
        from model.kernels import fp8_grouped, fp8_quantize

        return [
            fp8_grouped.multiply_rows(
                fp8_quantize.quantize_rows(x, counts, tokens=every, power_of_two=True), codes[0], counts
            )
        ]

    def codes_only() -> list[Tensor]:
        from model.kernels import fp8_grouped

        return [fp8_grouped.multiply_rows(codes_of_rows, codes[0], counts)]

    sides: dict[str, Work] = {"bf16": plain}
    if device == "cuda":
        from model.kernels import fp8_quantize

        codes, codes_of_rows = (
            fp8_quantize.quantize_weights(weight, power_of_two=True),
            fp8_quantize.quantize_rows(x, counts, tokens=every, power_of_two=True),
        )
        sides |= {"block FP8": in_fp8, "block FP8, rows rounded before": codes_only}
    clock.table(f"Grouped product, {sizes.experts} × {size} × {width}, {rows} rows", sides, 2 * rows * size * width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--batch", type=int, default=8, help="sequences of 4096 (default: 8)")
    parser.add_argument("--rounds", type=int, default=11, help="that count (default: 11)")
    parser.add_argument("--only", choices=("attention", "experts", "products"))
    arguments = parser.parse_args()
    sizes = Sizes(1, 128, 8, 2, 128, 128) if arguments.small else Sizes(batch=arguments.batch)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    print(f"{date.today()}, {name}, torch {torch.__version__}, {sizes}, medians of {arguments.rounds}")
    clock = Clock(arguments.device, arguments.rounds)
    for part in (attention, experts, products):
        if arguments.only in (None, part.__name__):
            part(clock, sizes, arguments.device)


if __name__ == "__main__":
    main()
