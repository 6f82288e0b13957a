"""The page that a report is: one HTML file that loads nothing, readable on a phone, in light and in dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Facts = Sequence[tuple[str, str]]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_COLORS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --faint: #5c6776; --grid: #d5dae1; --bad: #b3261e; --odd: #8a5a00;
  --line-1: #0072b2; --line-2: #c1500a; --line-3: #00795a; --line-4: #9a4c86; --line-5: #857200; --line-6: #4a5fc1; }
@media (prefers-color-scheme: dark) { :root {
  --page: #11151b; --card: #1a2029; --ink: #e4e9f0; --faint: #9aa6b5; --grid: #39434f; --bad: #ff8a80; --odd: #ffc457;
  --line-1: #56b4e9; --line-2: #f0a202; --line-3: #3fc79a; --line-4: #e39ac9; --line-5: #f0e442; --line-6: #98a9ff; } }
"""

_STYLE = """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: clamp(16px, 4vw, 40px); }
header p { margin: 0; color: var(--faint); }
h1 { margin: 0; font-size: clamp(26px, 5vw, 38px); line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 19px; }
.tiles { display: grid; gap: 12px; margin: 24px 0; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); }
.tiles div { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 12px 16px; }
.tiles dt { color: var(--faint); font-size: 14px; }
.tiles dd { margin: 0; font-size: clamp(18px, 5vw, 23px); font-weight: 650; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-auto-flow: dense; gap: 20px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; min-width: 0;
  padding: clamp(14px, 3vw, 22px); }
section.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--faint); }
.facts { display: grid; grid-template-columns: auto 1fr; gap: 4px 20px; margin: 14px 0 0; font-size: 15px; }
.wide .facts { max-width: 560px; }
.facts dt { color: var(--faint); }
.facts dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.note { color: var(--faint); margin: 0 0 14px; font-size: 15px; }
.findings { list-style: none; margin: 24px 0; padding: 0; display: grid; gap: 8px; }
.findings li { background: var(--card); border: 1px solid var(--grid); border-left: 6px solid var(--grid);
  border-radius: 10px; padding: 10px 16px; overflow-wrap: anywhere; }
.findings li.bad { border-left-color: var(--bad); }
.findings li.odd { border-left-color: var(--odd); }
.findings b { margin-right: 4px; }
.bad b { color: var(--bad); }
.odd b { color: var(--odd); }
.scroll { overflow-x: auto; }
.scroll.drawing svg { min-width: 700px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding: 6px 0; }
th, td { padding: 3px 12px 3px 0; text-align: right; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { min-width: 5em; max-width: 34em; overflow-wrap: break-word; }
.words td:last-child { min-width: 12em; }
.words td:first-child { white-space: nowrap; }
.maps { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(46%, 250px), 1fr)); }
.maps.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 14px; color: var(--faint); overflow-wrap: anywhere; }
.maps img { display: block; width: 100%; border-radius: 4px; image-rendering: pixelated; }
.maps details { margin-top: 2px; font-size: 14px; }
.scale { display: flex; gap: 10px; align-items: center; margin-top: 8px; font-size: 14px; color: var(--faint); }
.scale i { flex: 0 1 220px; height: 10px; border-radius: 5px; }
pre { margin: 12px 0 0; overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""


@dataclass(frozen=True)
class Card:
    """A part of the page: a picture (trusted markup) and the numbers behind it."""

    title: str
    picture: str
    facts: Facts
    is_wide: bool = False
    note: str = ""


@dataclass(frozen=True)
class Notice:
    """A line at the top of the page: something wrong (`is_bad`), something odd, or that there is neither."""

    text: str
    is_bad: bool = False
    is_odd: bool = False


@dataclass(frozen=True)
class Figure:
    """A bitmap (an address of its data) as high as it is to be shown, in pixels, what it shows, and markup below it."""

    address: str
    height: int
    caption: str
    description: str
    below: str = ""


def page(
    *,
    title: str,
    subtitle: str,
    tiles: Facts,
    cards: Sequence[Card],
    config_text: str,
    kind: str = "Training report",
    notices: Sequence[Notice] = (),
) -> str:
    """The whole file. All texts are escaped here; only pictures are markup already."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)} · {escape(kind.lower())}</title>
<style>{_COLORS}{_STYLE}</style>
</head>
<body>
<main>
<header>
<p>{escape(kind)}</p>
<h1>{escape(title)}</h1>
<p>{escape(subtitle)}</p>
</header>
{_notices(notices)}<dl class="tiles">{"".join(f"<div>{_fact(fact)}</div>" for fact in tiles)}</dl>
<div class="cards">
{"".join(_section(card) for card in cards)}<section class="wide">
<h2>Configuration</h2>
<details><summary>every key, as the run used it</summary>
<pre>{escape(config_text)}</pre></details>
</section>
</div>
</main>
</body>
</html>
"""


def image_file(picture: str) -> str:
    """An `svg` element as a file of its own, for other documents, in the page's colours for light and dark."""
    style = f"{_COLORS}svg {{ background: var(--card); }} text {{ font-family: system-ui, sans-serif !important; }}"
    head, _, body = picture.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{body}\n'


def figures(pictures: Sequence[Figure], scale: tuple[str, str, str] | None = None, *, large: bool = False) -> str:
    """Bitmaps with captions, side by side as far as there is room, and below them the scale of their colours: what is
    at its low end, a CSS gradient, what is at its high end."""
    shown = "".join(
        f'<figure><img src="{figure.address}" alt="{escape(figure.description)}" style="height: {figure.height}px">'
        f"<figcaption>{escape(figure.caption)}</figcaption>{figure.below}</figure>\n"
        for figure in pictures
    )
    css_class = "maps large" if large else "maps"
    return f'<div class="{css_class}">\n{shown}</div>\n{color_legend(*scale) if scale else ""}'


def color_legend(low: str, gradient: str, high: str) -> str:
    """What the colours of a heat map mean."""
    return f'<div class="scale">{escape(low)}<i style="background: {gradient}"></i>{escape(high)}</div>'


def folded_table(summary: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of numbers that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>\n{table(caption, head, rows)}</details>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, of_words: bool = False) -> str:
    """A table, of numbers or of words, as wide as it needs to be in a frame of its own."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    css_class = ' class="words"' if of_words else ""
    return (
        f'<div class="scroll" tabindex="0"><table{css_class}><caption>{escape(caption)}</caption>'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def scrolled(drawing: str) -> str:
    """A drawing that needs more width than a phone has, in a frame of its own."""
    return f'<div class="scroll drawing" tabindex="0">{drawing}</div>'


def _notices(notices: Sequence[Notice]) -> str:
    if not notices:
        return ""
    lines = "".join(_notice(notice) for notice in notices)
    return f'<ul class="findings" aria-label="Findings">\n{lines}</ul>\n'


def _notice(notice: Notice) -> str:
    if not (notice.is_bad or notice.is_odd):
        return f"<li>{escape(notice.text)}</li>\n"
    css_class, word = ("bad", "✖ Problem") if notice.is_bad else ("odd", "▲ Notice")
    return f'<li class="{css_class}"><b>{word}</b> {escape(notice.text)}</li>\n'


def _section(card: Card) -> str:
    note = f'<p class="note">{escape(card.note)}</p>\n' if card.note else ""
    facts = f'<dl class="facts">{"".join(map(_fact, card.facts))}</dl>\n' if card.facts else ""
    css_class = ' class="wide"' if card.is_wide else ""
    return f"<section{css_class}>\n<h2>{escape(card.title)}</h2>\n{note}{card.picture}\n{facts}</section>\n"


def _fact(fact: tuple[str, str]) -> str:
    return f"<dt>{escape(fact[0])}</dt><dd>{escape(fact[1])}</dd>"
