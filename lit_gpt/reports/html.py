"""Owns the page of a report: one file of HTML that loads nothing, light and dark, for any width.

What is text in it goes through html.escape. The one script is named by its hash: no other would
run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #f9f9f7; --card: #fff; --ink: #16150f; --soft: #66645c;
  --line: #e4e2da; --c0: #2a78d6; --c1: #eb6834; --c2: #1b9e77; --c3: #8a4fc4; --c4: #c99400;
  --c5: #d6447f; --c6: #4d5b6b; --c7: #7a9a1e }
@media (prefers-color-scheme: dark) { :root { --page: #131312; --card: #1d1d1b; --ink: #f2f1ec;
  --soft: #a3a198; --line: #34332f; --c0: #5b9ff0; --c1: #f08a5d; --c2: #35c797; --c3: #b98ae8;
  --c4: #dfb12f; --c5: #ee78a6; --c6: #a9b6c4; --c7: #a9c94a } }
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) } .c3 { --c: var(--c3) }
.c4 { --c: var(--c4) } .c5 { --c: var(--c5) } .c6 { --c: var(--c6) } .c7 { --c: var(--c7) }
* { box-sizing: border-box; min-width: 0; overflow-wrap: anywhere }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Noto Sans",
  "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 48px }
h1 { font-size: 26px; line-height: 1.2; margin: 0 }
h2 { font-size: 17px; margin: 36px 0 10px }
p { margin: 4px 0 }
header { margin-bottom: 18px }
.soft { color: var(--soft); font-size: 13px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px }
.grid, .small, .tiles { display: grid; gap: 0 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)) }
.small { gap: 14px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)) }
.tiles { gap: 10px; margin: 18px 0 14px;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)) }
.tiles b { display: block; font-size: 24px; line-height: 1.3; font-weight: 600 }
.tiles, table, .chart { font-variant-numeric: tabular-nums }
.chart { margin: 0 }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-bottom: 12px; font-size: 14px }
figcaption b { font-weight: 600; margin-right: auto }
.key { color: var(--soft); font-size: 13px }
.key::before, .tip span::before { content: ""; display: inline-block; width: 14px; height: 3px;
  border-radius: 2px; background: var(--c); margin-right: 6px; vertical-align: middle }
.key.faint::before, .tip .faint::before { opacity: .45 }
.plot { position: relative; height: 150px; margin: 0 10px 24px 42px; touch-action: pan-y }
.tall .plot { height: 330px; margin-bottom: 30px }
svg { position: absolute; width: 100%; height: 100%; overflow: visible }
path { fill: none; stroke: var(--c); stroke-width: 2; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; stroke-linecap: round }
path.faint { opacity: .4; stroke-width: 1.5 }
.small path { stroke-width: 1.5 }
path.dots, .small path.dots { stroke-width: 6 }
path.lines, .small path.lines { stroke: var(--line); stroke-width: 1 }
.x, .y { position: absolute; font-size: 12px; line-height: 1; color: var(--soft);
  white-space: nowrap }
.y { right: calc(100% + 8px); transform: translateY(-50%) }
.x { top: calc(100% + 8px); transform: translateX(-50%) }
.best { position: absolute; width: 14px; height: 14px; margin: -7px; border: 2px solid var(--c);
  border-radius: 50%; background: var(--card) }
.best::after { content: ""; position: absolute; inset: 2px; border-radius: 50%;
  background: var(--c) }
.best span { position: absolute; top: 15px; font-size: 13px; white-space: nowrap;
  font-weight: 600; line-height: 1.2;
  text-shadow: 0 0 3px var(--card), 0 0 3px var(--card), 0 0 3px var(--card) }
.best.left span { right: -4px } .best.right span { left: -4px }
.rule { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft) }
.tip { position: absolute; top: 4px; z-index: 1; padding: 6px 10px; border-radius: 6px;
  font-size: 13px; background: var(--card); border: 1px solid var(--line); white-space: nowrap;
  box-shadow: 0 2px 10px #0003; pointer-events: none }
.tip span { display: block }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px }
th, td { text-align: left; padding: 5px 20px 5px 0; vertical-align: top; font-weight: 400;
  border-top: 1px solid var(--line) }
tr > :last-child { padding-right: 0 }
thead th { border-top: 0; color: var(--soft); font-size: 13px }
.numbers th, .numbers td { white-space: nowrap }
.numbers tbody th { font-weight: 600 }
.facts { width: 100% }
.facts th { color: var(--soft); width: 40% }
.facts tr:first-child > *, .sample:first-child { border-top: 0 }
.sample { display: grid; gap: 6px 20px; grid-template-columns: 110px minmax(0, 1fr);
  padding: 12px 0; border-top: 1px solid var(--line) }
.texts { display: grid; gap: 10px 20px; font-size: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)) }
.texts > div { white-space: pre-wrap; unicode-bidi: isolate }
mark { color: var(--soft); background: none }
code { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace }
summary { cursor: pointer; color: var(--soft); font-size: 14px; padding-top: 6px }
.options { columns: 330px; column-gap: 28px; font-size: 13px }
.options div { break-inside: avoid; padding: 1px 0 1px 1em; text-indent: -1em }
.options span { color: var(--soft) }
@media (max-width: 560px) { main { padding: 20px 12px 40px } .tall .plot { height: 240px }
  .sample { grid-template-columns: minmax(0, 1fr) } .card { padding: 12px } }
"""

SCRIPT = """
for (const plot of document.querySelectorAll(".plot")) {
  const {steps: [from, to], lines} = JSON.parse(plot.dataset.chart);
  const make = (name, parent) => parent.appendChild(Object.assign(document.createElement(name[0]),
    {className: name[1]}));
  const rule = make(["div", "rule"], plot), tip = make(["div", "tip"], plot);
  const hide = () => { rule.hidden = tip.hidden = true };
  const nearest = (points, at) => points.reduce((a, b) =>
    Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
  hide();
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const at = from + (to - from) * (event.clientX - box.left) / box.width;
    const step = nearest(lines.map(line => nearest(line.points, at)), at)[0];
    const x = 100 * (step - from) / (to - from);
    tip.textContent = "step " + step.toLocaleString("en");
    for (const {name, look, points} of lines) {
      const [near, value] = nearest(points, step);
      if (Math.abs(near - step) <= (to - from) / 50)
        make(["span", look], tip).textContent = (lines.length > 1 ? name + " " : "") + value;
    }
    rule.hidden = tip.hidden = false;
    rule.style.left = x + "%";
    tip.style.left = x > 50 ? "" : "calc(" + x + "% + 10px)";
    tip.style.right = x > 50 ? "calc(" + (100 - x) + "% + 10px)" : "";
  });
}
"""


def page(
    title: str, body: str, style: str = "", script: str = SCRIPT, source: str = "'none'"
) -> str:
    """The whole file; `body` is HTML, `source` what the script may ask for, as CSP has it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    policy += f"; connect-src {source}; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style></head>\n"
        f"<body><main>{body}</main>\n<script>{script}</script></body></html>\n"
    )


def section(title: str, *parts: str, kind: str = "card") -> str:
    """A headline and what is under it; "" where that is nothing."""
    content = "".join(parts)
    if not content:
        return ""
    return f'<section><h2>{escape(title)}</h2><div class="{kind}">{content}</div></section>\n'


def tiles(numbers: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers: what it is, the number, and what belongs to it."""
    cells = (
        f'<div class="card"><span class="soft">{escape(name)}</span><b>{escape(number)}</b>'
        f'<span class="soft">{escape(more)}</span></div>'
        for name, number, more in numbers
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, one a row; "" where there are none."""
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in pairs)
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first cell of each row names it. Wider than the page, it scrolls by itself."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{top}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
