"""Where the time of a step goes: kernels sorted into kinds by their names, as a table and as a picture."""

import re
from collections.abc import Sequence
from pathlib import Path

Kernels = Sequence[tuple[str, bool, float, int]]
KINDS = (
    ("grouped GEMM", r"group(ed)?_?(gemm|mm|problem)|GroupProblemShape|grouped"),
    ("attention", r"fmha|flash|attention|sdpa|mla_|cudnn.*(fprop|bprop|dgrad)"),
    ("dense GEMM", r"nvjet|gemm|cutlass|xmma|splitk|cublas|matmul"),
    ("norm, RoPE, SwiGLU", r"norm|rope|rotary|silu|swiglu|sigmoid_backward"),
    ("loss", r"cross_entropy|softmax|nll_loss|logsumexp|lse"),
    ("permute and combine", r"permut|collect|gather|scatter|spread|combine|index|embedding"),
    ("gate", r"gate|topk|top_k|router|sort|radix|histogram|bincount|cumsum|scan|sigmoid"),
    ("optimizer", r"adam|multi_tensor|lpnorm|l2norm"),
    ("gradient accumulation", r"accumulate|sum_in_fp32|CUDAFunctor_add|add_"),
    ("quantisation", r"quant|fp8|amax|cast_transpose"),
    ("copies", r"memcpy|memset|copy|fill|cat"),
)
OTHER, IDLE = "other elementwise", "no kernel running"
COLORS = (
    "#3b6fb6", "#d1773c", "#74a9cf", "#5f9e6e", "#b55d60", "#857aab", "#8d7866",
    "#d095bf", "#c9b458", "#5b5b5b", "#a6a6a6", "#d9d9d9", "#f0f0f0",
)  # fmt: skip


def sort_kernels(kernels: Kernels, seconds: float) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of each kind, in order. What a step of `seconds` has beyond them is idle time."""
    sums = {kind: (0.0, 0) for kind in [*(kind for kind, _ in KINDS), OTHER]}
    for name, in_optimizer, microseconds, launches in kernels:
        kind = "optimizer" if in_optimizer else _kind(name)
        time, number = sums[kind]
        sums[kind] = time + microseconds / 1e3, number + launches
    idle = seconds * 1e3 - sum(time for time, _ in sums.values())
    return {kind: found for kind, found in sums.items() if found[1]} | {IDLE: (max(idle, 0.0), 0)}


def profile_table(kernels: Kernels, seconds: float) -> str:
    """A table in Markdown."""
    sums = sort_kernels(kernels, seconds)
    total = sum(time for time, _ in sums.values())
    lines = ["| kind | ms | share | launches |", "|---|---|---|---|"]
    for kind, (time, launches) in sums.items():
        lines.append(f"| {kind} | {time:.1f} | {time / total:.1%} | {launches or ''} |")
    return "\n".join(lines) + "\n"


def draw_profile(kernels: Kernels, seconds: float, title: str, file: Path) -> None:
    """One stacked bar with its legend, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "step"
    from matplotlib import pyplot

    sums = sort_kernels(kernels, seconds)
    total = sum(time for time, _ in sums.values())
    figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    start = 0.0
    for (kind, (time, _)), color in zip(sums.items(), COLORS, strict=False):
        axes.barh(
            0, time, left=start, color=color, edgecolor="white", label=f"{kind}: {time:.1f} ms ({time / total:.0%})"
        )
        start += time
    axes.set_yticks([])
    axes.set_xlim(0, total)
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)
