"""Where the time of a step goes: kernels sorted into kinds by their names and by what launched them, as a table and as
a picture."""

import re
from collections.abc import Sequence
from pathlib import Path

Kernels = Sequence[tuple[str, str, float, int]]
# The first kind whose pattern is found in "origin kernel" is that of a kernel.
KINDS = (
    ("optimizer", r"^optimizer |adam|multi_tensor"),
    (
        "grouped GEMM",
        r"GroupProblemShape|grouped_gemm|_weight_gradient_kernel|group_gemm|quack|_rows_kernel|_columns_kernel",
    ),
    ("attention", r"fmha|flash|sdpa|fused_attn|cudnn"),
    ("dense GEMM", r"nvjet|gemm|cutlass|xmma|splitK"),
    ("quantisation", r"quant|amax|cast_transpose|Fp8"),
    ("norms", r"_Norm|rms_?norm|layer_?norm"),
    ("RoPE, keys and values", r"_Rotate|_KeysAndValues|rope|rotary"),
    ("SwiGLU", r"_SwiGLU|swiglu|silu"),
    ("loss", r"_CrossEntropy|cross_entropy|softmax|nll_loss"),
    (
        "permute and combine",
        r"_Spread|_Collect|_Pick|_sum_kernel|permut|embedding|_rank_kernel|_place_kernel|gather|scatter|index",
    ),
    ("gate", r"_KernelGate|_Logits|topk|router|sort|histogram|scan|sigmoid"),
    ("adding gradients", r"AccumulateGrad|CUDAFunctor_add"),
    ("copies", r"memcpy|memset|copy|fill|Cat"),
)
OTHER, IDLE = "other", "no kernel running"
COLORS = (
    "#5b5b5b", "#3b6fb6", "#d1773c", "#74a9cf", "#9c755f", "#5f9e6e", "#b55d60", "#857aab",
    "#8d7866", "#d095bf", "#c9b458", "#86bcb6", "#a6a6a6", "#d9d9d9", "#f0f0f0",
)  # fmt: skip


def sort_kernels(kernels: Kernels, seconds: float) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of each kind, in order. What a step of `seconds` has beyond them is idle time."""
    sums = {kind: (0.0, 0) for kind in [*(kind for kind, _ in KINDS), OTHER]}
    for name, origin, microseconds, launches in kernels:
        kind = _kind(f"{origin} {name}")
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
    matplotlib.rcParams |= {"svg.hashsalt": "step", "svg.fonttype": "none"}
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


def _kind(text: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, text, re.IGNORECASE)), OTHER)
