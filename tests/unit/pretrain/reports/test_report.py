"""The report is one page that loads nothing, shows what the metrics say, and survives whatever a run folder holds."""

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from support import PROJECT

from pretrain.__main__ import main
from pretrain.config import dump_config, load_config
from pretrain.errors import UserError
from pretrain.reports.facts import duration
from pretrain.reports.heat_maps import draw_load
from pretrain.reports.plots import MAX_POINTS, thin_out
from pretrain.reports.report import write_report
from pretrain.reports.run_record import read_record

CONFIG = '[run]\nname = "{name}"\n[optimizer]\nclip = 1.0\n'
VOID = {"meta", "img", "br"}
LOADING = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, texts, tables of numbers, and tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.facts: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            if self.open[-1] == "dd":
                self.facts.setdefault(self.text[-1], data)
            self.text.append(data.strip())

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    loss = 2.0 + 3.0 / step
    line: dict[str, Any] = {
        "step": step,
        "tokens": 1000 * step,
        "loss": loss + 0.3,
        "lm_loss": loss,
        "mtp_loss": loss + 0.5,
        "lr": 1e-3,
        "batch_size": 8,
        "grad_norm": 2.0 if step <= 10 else 0.5,
        "step_time_s": 60.0,
        "tokens_per_s": 1234.0,
        "tflops_per_gpu": 321.0,
        "mfu": None,
        "max_memory_gib": 12.5,
        "load_max_violation": 1.0 / step,
        "dead_experts": 3 if step == 1 else 0,
        "skipped": 0,
    }
    if step % 10 == 0:
        line |= {"val_loss": math.log(8), "expert_load": {"1": [3, 1, 0, 4], "2": [2, 2, 2, 2]}}
    return line | changes


def write_run(folder: Path, *lines: str, name: str = "example") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(CONFIG.format(name=name))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def typical_run(folder: Path, num_steps: int = 100, name: str = "example") -> Path:
    return write_run(folder, *(json.dumps(metrics(step)) for step in range(1, num_steps + 1)), name=name)


def report_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = typical_run(tmp_path_factory.mktemp("runs") / "run")
    text = write_report(folder).read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {"config.toml", "metrics.jsonl", "report.html"}
    return text


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_every_element_is_closed(page: Page) -> None:
    assert page.open == []


def test_the_page_loads_nothing(text: str, page: Page) -> None:
    for forbidden in ("http://", "https://", "//cdn", "@import", "<script", "<link", "<iframe", "url(http"):
        assert forbidden not in text, forbidden
    for tag, attributes in page.elements:
        for name in LOADING & set(attributes):
            value = attributes[name] or ""
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:60])


def test_pictures_of_everything_are_there(page: Page) -> None:
    titles = [page.text[index] for index in range(len(page.text)) if page.text[index] in TITLES]
    assert titles == TITLES
    labels = [attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg"]
    assert labels == [
        "nats a token",
        "nats a token",
        "learning rate, batch size, sequences",
        "norm before clipping",
        "tokens a second",
        "most so far on the first rank, GiB",
        "largest load / mean load − 1, worst layer, experts without a token",
    ]
    assert page.count("img") == 2
    assert {"layer 1: 4 experts", "layer 2: 4 experts"} <= set(page.text)


TITLES = [
    "Loss",
    "Loss after the first fifth",
    "Learning rate, batch, γ, MTP weight",
    "Gradient",
    "Throughput",
    "Memory",
    "Balance of the experts",
    "Load of the experts",
    "Differences of the configuration",
    "Configuration",
]


def test_headline_numbers(page: Page) -> None:
    facts = page.facts
    expected = {
        "steps": "100",
        "tokens": "100K",
        "loss": "2.0300",
        "held-out loss": "2.0794",
        "tokens a second": "1.23K",
        "time in steps": "1 h 40 min",
        "next token, lowest step": "2.0300",
        "multi-token prediction, last step": "2.5300",
        "held out, last as perplexity": "8",
        "learning rate, highest": "0.001",
        "batch, last": "8",
        "largest": "2",
        "steps clipped": "10.0 %",
        "per device, median": "321 TFLOP/s",
        "memory, highest": "12.5 GiB",
        "violation, largest": "1.00",
        "experts without a token, most": "3",
        "experts without a token, last": "0",
    }
    assert {name: facts.get(name) for name in expected} == expected
    assert "of the device's peak" not in facts


def test_light_and_dark_and_a_phone_are_thought_of(text: str) -> None:
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport" content="width=device-width' in text
    assert "var(--line-1)" in text
    assert "#00000" not in text


def test_texts_of_the_run_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=y>&amp;"
    folder = typical_run(tmp_path / "run", 10, name=evil.replace('"', ""))
    lines = [json.dumps(metrics(10, expert_load={f'"><b>{evil}': [1, 2]}))]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = report_of(folder)
    assert found.count("script") == 0
    assert found.count("b") == 0
    assert all((attributes.get("src") or "").startswith("data:") for tag, attributes in found.elements if tag == "img")
    assert evil in found.text
    assert any(evil in text and "[run]" in text for text in found.text)
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)


def pipeline_run(folder: Path, *overrides: str, **changes: Any) -> Path:
    config = load_config(PROJECT / "configs" / "tiny.toml", ["train.micro_batch_size=1", *overrides])
    write_run(folder, *(json.dumps(metrics(step, world_size=4, **changes)) for step in (1, 2)))
    (folder / "config.toml").write_text(dump_config(config))
    return folder


@pytest.mark.parametrize(("schedule", "layers"), [("1f1b", 3), ("zbv", 7), ("dualpipe", 3)])
def test_a_pipeline_is_drawn(tmp_path: Path, schedule: str, layers: int) -> None:
    overrides = ("parallel.pp=4", f"parallel.schedule={schedule}", f"model.num_hidden_layers={layers}")
    found = report_of(pipeline_run(tmp_path / "run", *overrides))
    assert "Pipeline" in found.text
    assert found.facts["micro-batches"] == "8"
    assert {"rank 0", "rank 3"} <= set(found.text)
    assert "rank 4" not in found.text
    assert found.open == []
    assert "http://" not in (tmp_path / "run" / "report.html").read_text()


def test_of_many_micro_batches_some_are_drawn(tmp_path: Path) -> None:
    found = report_of(pipeline_run(tmp_path / "run", "parallel.pp=4", "train.batch_size=1000", batch_size=1000))
    assert found.facts["micro-batches"] == "1,000"
    assert found.facts["bubble"] == "0.3 %"
    assert any("drawn with 16 micro-batches" in text for text in found.text)


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ((), {}),
        (("parallel.pp=4",), {"world_size": None}),
        (("parallel.pp=4",), {"world_size": 1e300}),
        (("parallel.pp=4",), {"world_size": 6}),
        (("parallel.pp=4",), {"batch_size": 1e300}),
        (("parallel.pp=4", "parallel.schedule=dualpipe"), {"batch_size": 3}),
    ],
)  # fmt: skip
def test_no_pipeline_no_drawing(tmp_path: Path, overrides: tuple[str, ...], changes: dict[str, Any]) -> None:
    folder = pipeline_run(tmp_path / "run", *overrides)
    write = [json.dumps(metrics(step, **{"world_size": 4, **changes})) for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(write) + "\n")
    assert "Pipeline" not in report_of(folder).text


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = typical_run(tmp_path / "run", 20)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "tok')
    assert report_of(folder).facts["steps"] == "20"


@pytest.mark.parametrize("line", ["not JSON", "[1, 2]", '{"step": 3}', '{"step": 3, "tokens": "many"}', "[" * 100_000])
def test_a_line_that_is_no_record(tmp_path: Path, line: str) -> None:
    folder = write_run(tmp_path / "run", json.dumps(metrics(1)), line, json.dumps(metrics(3)))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not a record of a step; remove that line"):
        write_report(folder)


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    odd = metrics(2, lm_loss=None, lr="fast", grad_norm=True, batch_size=10**400, mtp_loss={}, val_loss=[])
    folder = write_run(
        tmp_path / "run", json.dumps(metrics(1)), json.dumps(odd), '{"step": 3, "tokens": 9, "lm_loss": NaN}'
    )
    columns = read_record(folder).columns
    for key in ("lm_loss", "lr", "grad_norm", "batch_size", "mtp_loss", "val_loss"):
        assert np.isnan(columns[key][1:]).all(), key
    assert report_of(folder).open == []


def test_a_run_of_one_step_without_experts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", json.dumps({"step": 1, "tokens": 64, "lm_loss": 4.0}))
    found = report_of(folder)
    assert found.count("svg") == 1
    assert found.facts["loss"] == "4.0000"
    assert "Load of the experts" not in found.text


def test_loads_of_another_shape_are_left_out(tmp_path: Path) -> None:
    loads: list[Any] = [{"1": [1, 2]}, {"1": [1, 2, 3]}, {"2": [1, 2]}, "x", {"1": ["a"]}, {"1": [3, None]}]
    lines = [json.dumps(metrics(step, expert_load=load)) for step, load in enumerate(loads, 1)]
    history = read_record(write_run(tmp_path / "run", *lines)).loads
    assert history.layers["1"].tolist() == [[1, 2], [3, 0]]
    assert history.tokens.tolist() == [1000, 6000]


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    line = json.dumps(metrics(10, expert_load={str(layer): list(range(64)) for layer in range(4)}))
    folder = write_run(tmp_path / "run", *(line.replace('"step": 10', f'"step": {step}') for step in range(1, 3001)))
    assert len(read_record(folder).loads.tokens) <= 512
    assert write_report(folder).stat().st_size < 1_000_000


def test_thinning_keeps_means_spikes_and_gaps() -> None:
    values = np.ones(10 * MAX_POINTS)
    values[12], values[25], values[30:40], values[45] = 7.0, -3.0, np.nan, np.nan
    x, mean, low, high = thin_out(np.arange(len(values), dtype=float), values)
    assert len(x) == MAX_POINTS
    assert x[:3].tolist() == [0, 10, 20]
    assert (mean[1], low[1], high[1]) == (1.6, 1, 7)
    assert (mean[2], low[2], high[2]) == (0.6, -3, 1)
    assert np.isnan([mean[3], low[3], high[3]]).all()
    assert (mean[4], low[4], high[4]) == (1, 1, 1)


def test_a_heat_map_has_a_row_for_each_expert() -> None:
    load = np.array([[0.0, 4, 2, 2]] * 5)
    address = draw_load(load)
    assert address.startswith("data:image/png;base64,")
    pixels = imread(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert pixels.shape[:2] == (4, 5)
    darkness = pixels[:, 0, :3].sum(-1)
    assert darkness[0] < darkness[2] == darkness[3] < darkness[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (450, "7 min 30 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_runs_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=rf"no metrics at {tmp_path}/metrics\.jsonl; train first"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "train first" in capsys.readouterr().err
    folder = write_run(tmp_path / "empty")
    with pytest.raises(UserError, match="holds no step yet; train first"):
        write_report(folder)
    (folder / "config.toml").unlink()
    with pytest.raises(UserError, match=r"config\.toml cannot be read: .*; it is written when a run starts"):
        write_report(folder)
    (folder / "config.toml").write_text("[run")
    with pytest.raises(UserError, match=r"config\.toml cannot be read: "):
        write_report(folder)


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = typical_run(tmp_path / "run", 10)
    write_report(folder).write_text("the old one")

    def fail(_descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "the old one"


@pytest.mark.parametrize(
    "config",
    [
        f"[{'.'.join('a' * 3000)}]",
        "a = " + "1" * 5000,
        "a = " + "[" * 3000 + "]" * 3000,
        "[optimizer]\nclip = 1" + "0" * 400,
        "[train]\nsteps = 1" + "0" * 400 + "\n[parallel]\npp = 1" + "0" * 400,
        "[timeline]\nlearning_rate = [{ value = 1, until = inf }]",
        "run = 3\nparallel = []\noptimizer = nan",
    ],
)
def test_configurations_that_nobody_wrote(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A page, or one line that says why not."""
    folder = typical_run(tmp_path / "run", 5)
    (folder / "config.toml").write_text(config)
    (folder / "origin.json").write_text('{"base": {"values": ' + '{"a":' * 300 + "1" + "}" * 302)
    for command in (["report", str(folder)], ["watch", "--once", str(folder)]):
        assert main(command) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_numbers_without_end(tmp_path: Path) -> None:
    folder = typical_run(tmp_path / "run", 5)
    (folder / "origin.json").write_text('{"device_memory_gib": 1' + "0" * 400 + "}")
    (folder / "events.jsonl").write_text('{"kind": "save", "text": "x", "time": 1' + "0" * 400 + "}\n")
    assert report_of(folder).open == []
