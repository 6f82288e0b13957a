"""The rules of the house, read off the source: who imports whom, what lives in one file, what is never called, and how
long files and functions may be. Planted faults show that each rule can fail."""

import ast
import sys
from collections.abc import Iterator

import pytest
from support import PROJECT

PACKAGES = ("model", "parallel", "data", "pretrain")
MAY_IMPORT = {
    "model": {"torch", "triton"},
    "parallel": {"model", "torch", "deepspeed", "triton", "cuda"},
    "data": {
        "numpy", "torch", "safetensors", "pydantic", "rich",
        "datasets", "pyarrow", "zstandard", "sentencepiece", "tokenizers",
    },
    "pretrain": {
        "parallel", "model", "data",
        "numpy", "torch", "safetensors", "pydantic", "rich", "tomli_w", "matplotlib",
        "sentencepiece", "tokenizers", "xxhash", "wandb", "mlflow",
    },
}  # fmt: skip
HEAVY = ("transformer_engine", "quack", "flash_attn")
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
NEVER_CALLED = {
    "eval", "exec", "compile", "torch.load", "yaml.load", "os.system", "os.popen", "numpy.load", "np.load",
}  # fmt: skip
KERNELS = ("model/kernels/", "parallel/adamw_kernel.py")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60


def breaches(path: str, source: str) -> Iterator[str]:
    """What in a file breaks the rules; `path` is relative to the project."""
    package = path.partition("/")[0]
    tree = ast.parse(source)
    for name in _imports(tree):
        yield from _check_import(package, name)
    if package == "parallel" and path != "parallel/peer_memory.py" and "cuda" in _roots(tree):
        yield "only parallel/peer_memory.py may import cuda"
    if path != "parallel/zero.py" and _names(tree, "deepspeed"):
        yield "only parallel/zero.py may name deepspeed"
    for heavy in HEAVY:
        if package != "model" and _names(tree, heavy):
            yield f"only model may name {heavy}"
    if not path.startswith(KERNELS) and _names(tree, "triton"):
        yield f"only {' and '.join(KERNELS)} may name triton"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _check_call(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}"
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"the file has {lines} lines, more than {MAX_FILE_LINES}"


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, by a statement anywhere or by name; "?" for a name that is worked out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            yield str(name.value) if isinstance(name, ast.Constant) else "?"


def _roots(tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in _imports(tree)}


def _check_import(package: str, name: str) -> Iterator[str]:
    root = name.partition(".")[0]
    if root in UNPICKLING:
        yield f"{root} runs what it reads"
    elif name == "?":
        yield "imports a module whose name is worked out"
    elif root not in sys.stdlib_module_names and root not in {package, *HEAVY} | MAY_IMPORT[package]:
        yield f"{package} may not import {root}"
    elif package == "model" and (root == "os" or name.startswith("torch.distributed")):
        yield f"model knows no {name}"


def _check_call(node: ast.Call) -> Iterator[str]:
    name = _dotted(node.func)
    if name in NEVER_CALLED:
        yield f"calls {name}"
    if any(word.arg == "shell" and getattr(word.value, "value", True) for word in node.keywords):
        yield "starts a shell"
    if any(word.arg == "allow_pickle" and getattr(word.value, "value", True) for word in node.keywords):
        yield "allows pickle"


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""


def _names(tree: ast.AST, module: str) -> bool:
    """Whether a module is imported or stands in a text as a module's name."""
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return any(name == module or name.startswith(f"{module}.") for name in (*_imports(tree), *texts))


def sources() -> dict[str, str]:
    files = [path for package in PACKAGES for path in sorted((PROJECT / package).rglob("*.py"))]
    return {path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_the_rules_are_kept() -> None:
    found = [f"{path}: {breach}" for path, source in sources().items() for breach in breaches(path, source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("heavy", HEAVY)
def test_what_only_a_gpu_has_is_named_in_one_file(heavy: str) -> None:
    naming = [path for path, source in sources().items() if _names(ast.parse(source), heavy)]
    assert len(naming) <= 1, naming


def test_every_package_is_looked_at() -> None:
    assert {path.partition("/")[0] for path in sources()} == set(PACKAGES)
    assert {"parallel/zero.py", "model/transformer.py", "pretrain/__main__.py"} <= set(sources())


@pytest.mark.parametrize(
    ("path", "source", "breach"),
    [
        ("model/a.py", "import parallel.zero", "model may not import parallel"),
        ("model/a.py", "from data.shards import Shard", "model may not import data"),
        ("model/a.py", "import numpy as np", "model may not import numpy"),
        ("model/a.py", "from torch import distributed", "model knows no torch.distributed"),
        ("model/a.py", "import torch.distributed.tensor", "model knows no torch.distributed.tensor"),
        ("model/a.py", "import os", "model knows no os"),
        ("parallel/a.py", "from data import order", "parallel may not import data"),
        ("parallel/a.py", "import pretrain", "parallel may not import pretrain"),
        ("data/a.py", "from model.config import ModelConfig", "data may not import model"),
        ("data/a.py", "def f():\n    from pretrain.config import Config", "data may not import pretrain"),
        ("data/a.py", "import transformers", "data may not import transformers"),
        ("data/a.py", "import importlib\nimportlib.import_module('pretrain.loop')", "data may not import pretrain"),
        ("data/a.py", "__import__('parallel')", "data may not import parallel"),
        ("data/a.py", "import importlib\nimportlib.import_module(name)", "imports a module whose name is worked out"),
        ("pretrain/a.py", "import requests", "pretrain may not import requests"),
        ("parallel/a.py", "import deepspeed", "only parallel/zero.py may name deepspeed"),
        ("parallel/a.py", "from deepspeed.moe import layer", "only parallel/zero.py may name deepspeed"),
        ("parallel/a.py", "load('deepspeed.comm')", "only parallel/zero.py may name deepspeed"),
        ("parallel/a.py", "from cuda.bindings import driver", "only parallel/peer_memory.py may import cuda"),
        ("model/a.py", "import cuda.bindings", "model may not import cuda"),
        ("parallel/a.py", "import transformer_engine", "only model may name transformer_engine"),
        ("model/a.py", "import triton", "only model/kernels/ and parallel/adamw_kernel.py may name triton"),
        ("pretrain/a.py", "import pickle", "pickle runs what it reads"),
        ("data/a.py", "def f():\n    from dill import loads", "dill runs what it reads"),
        ("data/a.py", "eval('1')", "calls eval"),
        ("data/a.py", "exec(text)", "calls exec"),
        ("model/a.py", "import torch\ntorch.load(path)", "calls torch.load"),
        ("data/a.py", "yaml.load(text)", "calls yaml.load"),
        ("data/a.py", "import os\nos.system('ls')", "calls os.system"),
        ("data/a.py", "import numpy as np\nnp.load(path)", "calls np.load"),
        ("data/a.py", "read(path, allow_pickle=True)", "allows pickle"),
        ("data/a.py", "import subprocess\nsubprocess.run('ls', shell=True)", "starts a shell"),
        ("data/a.py", "import subprocess\nsubprocess.run('ls', shell=wanted)", "starts a shell"),
        ("data/a.py", "x = 1\n" * 501, "the file has 501 lines, more than 500"),
        ("data/a.py", "def long():\n" + "    x = 1\n" * 60, "long has 61 lines, more than 60"),
        ("data/a.py", "class A:\n  async def long(self):\n" + "    x = 1\n" * 60, "long has 61 lines, more than 60"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(path: str, source: str, breach: str) -> None:
    assert list(breaches(path, source)) == [breach]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/a.py", "import math\nfrom model.config import ModelConfig\nfrom torch import nn"),
        ("model/a.py", "import transformer_engine.pytorch"),
        ("parallel/zero.py", "import importlib\nimportlib.import_module('deepspeed')"),
        ("pretrain/a.py", '"""What deepspeed does."""\nload_deepspeed()\nmodel.eval()'),
        ("pretrain/a.py", "import re\nre.compile('a')"),
        ("data/a.py", "import subprocess\nsubprocess.run(['ls'], shell=False)"),
        ("data/a.py", "from . import shards\nx = 1\n" + "x = 1\n" * 498),
        ("data/a.py", "def long():\n" + "    x = 1\n" * 59),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, source: str) -> None:
    assert list(breaches(path, source)) == []
