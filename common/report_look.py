"""How a report looks: colours, markers, dashes, keys of curves, the page's style sheet.

Colours are CSS variables, so that plots and tables follow the reader's light or dark theme.
"""

import html
from collections.abc import Iterable, Sequence
from typing import Any, Optional

from common.bd import Series

# Told apart by people with any kind of colour vision, each with 3:1 contrast to the paper.
# (light, dark), of Okabe and Ito 2008 and Paul Tol's sets.
_PALETTE = (
  ("#0072b2", "#56b4e9"),
  ("#d55e00", "#ff8f52"),
  ("#009e73", "#3fd0a2"),
  ("#aa3377", "#ec86bd"),
  ("#8a6d00", "#e3bf3e"),
  ("#4b3fa7", "#aaa0f5"),
)
COLORS = {  # name: (light, dark)
  "paper": ("#ffffff", "#14171a"),
  "ink": ("#1b1f24", "#e8eaed"),
  "muted": ("#5d6672", "#9aa3ad"),
  "line": ("#dfe3e8", "#2e343b"),
  "grey": ("#98a1ab", "#737c86"),
  **{f"s{i}": pair for i, pair in enumerate(_PALETTE)},
}
_DASHES = {
  "estimated": (5, 2),
  "itinf": (1.2, 1.6),
  "vbq": (7, 2, 1.2, 2),
  "estimate": (5, 2),
  "not stated": (1.6, 1.4),
}
# With six colours, eleven markers make 66 pairs before one comes again.
_MARKERS = "osD^vPX<>p*"


def color(series: Series) -> str:
  """The name of a curve's colour, in COLORS."""
  if series.published:
    return "grey"
  return "ink" if series.color < 0 else f"s{series.color % len(_PALETTE)}"


def marker(series: Series) -> str:
  """The shape of a curve's dots, as matplotlib calls it."""
  return _MARKERS[(series.color + 1) % len(_MARKERS)]


def dashes(series: Series) -> tuple[float, ...]:
  """The line's dashes, empty for a whole line: files or coded streams."""
  rate = series.publication.rate if series.publication else series.curve.source
  return _DASHES.get(rate, ())


def is_filled(series: Series) -> bool:
  """Whether its dots are filled: sizes of files, or published."""
  return series.curve.source in ("bitstream", "published")


def keys(series: Iterable[Series]) -> dict[str, str]:
  """Label -> what a curve is called in style sheets and SVG: o1, o2 (own), p1, p2 (published)."""
  found: dict[str, str] = {}
  count = {True: 0, False: 0}
  for s in series:
    count[s.published] += 1
    found[s.curve.label] = f"{'p' if s.published else 'o'}{count[s.published]}"
  return found


def code(key: str) -> str:
  """What people read for a key: numbers for published curves, letters for own ones (o27: AA)."""
  index = int(key[1:])
  if key[0] == "p":
    return str(index)
  letters = ""
  while index:
    index, rest = divmod(index - 1, 26)
    letters = chr(ord("A") + rest) + letters
  return letters


_MARKER_PATHS = {
  "o": '<circle cx="15" cy="6" r="3.6"/>',
  "s": '<path d="M11.6 2.6h6.8v6.8h-6.8z"/>',
  "D": '<path d="M15 1.2l4.8 4.8-4.8 4.8-4.8-4.8z"/>',
  "^": '<path d="M15 2l4 7.2h-8z"/>',
  "v": '<path d="M15 10l4-7.2h-8z"/>',
  "P": '<path d="M13.6 2h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z"/>',
  "X": '<path d="M12 1.6l3 2.6 3-2.6 1.6 1.6-2.8 2.8 2.8 2.8-1.6 1.6-3-2.6-3 2.6-1.6-1.6 2.8-2.8'
  '-2.8-2.8z"/>',
  "<": '<path d="M11 6l7.2-4v8z"/>',
  ">": '<path d="M19 6l-7.2-4v8z"/>',
  "p": '<path d="M15 2l4.2 3-1.6 4.8h-5.2l-1.6-4.8z"/>',
  "*": '<path d="M15 1l1.4 3.4 3.6.3-2.7 2.4.8 3.6-3.1-1.9-3.1 1.9.8-3.6-2.7-2.4 3.6-.3z"/>',
}


def swatch(series: Series) -> str:
  """A short piece of the curve, as SVG."""
  paint = f"var(--{color(series)})"
  fill = paint if is_filled(series) else "var(--paper)"
  pattern = " ".join(map(str, dashes(series)))
  pattern = f' stroke-dasharray="{pattern}"' if pattern else ""
  mark = '<circle cx="15" cy="6" r="1.6"/>' if series.published else _MARKER_PATHS[marker(series)]
  return (
    '<svg width="30" height="12" viewBox="0 0 30 12" aria-hidden="true">'
    f'<path d="M0 6h30" fill="none" stroke="{paint}" '
    f'stroke-width="{1.2 if series.published else 2}"{pattern}/>'
    f'<g fill="{fill}" stroke="{paint}" stroke-width="1.2">{mark}</g>'
    "</svg>"
  )


def escape(text: Any) -> str:
  """Text as HTML."""
  return html.escape(str(text))


def number(value: Optional[float], digits: int) -> str:
  """A number with a true minus; a dash for None."""
  return "\u2013" if value is None else f"{value:.{digits}f}".replace("-", "\u2212")


def count(number: int, noun: str) -> str:
  """ "1 run", "2 runs"."""
  return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def table(columns: Sequence[tuple[str, str]], rows: Iterable[str], kind: str = "") -> str:
  """An HTML table that scrolls within itself.

  Args:
    columns: (heading, class) of each.
    rows: Made by `row`.
    kind: Its class; "cards" turns each row into a card on a phone.
  """
  head = "".join(f'<th class="{kind}" scope="col">{escape(name)}</th>' for name, kind in columns)
  body = "\n".join(rows)
  return (
    f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
    f"<tbody>\n{body}\n</tbody></table></div>"
  )


def row(columns: Sequence[tuple[str, str]], cells: Sequence[str], kind: str = "") -> str:
  """A row of cells, which are HTML; each knows its column's heading, for cards."""
  inside = "".join(
    f'<td class="{c[1]}" data-of="{escape(c[0])}">{cell}</td>' for c, cell in zip(columns, cells)
  )
  return f'<tr class="{kind}">{inside}</tr>' if kind else f"<tr>{inside}</tr>"


STYLE = """
:root{--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:75rem;padding:2rem clamp(1rem,4vw,2.75rem) 4rem;
background:var(--paper);color:var(--ink);font:1rem/1.55 var(--sans)}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .35rem;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.2rem;line-height:1.3;margin:3rem 0 .5rem;letter-spacing:-.005em}
h3{font-size:.95rem;margin:1.5rem 0 .25rem}
figure h3{margin-top:0}
p,ul{margin:.5rem 0;max-width:48rem}
.meta,.note{max-width:none}
ul{padding-left:1.2rem}
li{margin:.25rem 0}
.meta,.note,figcaption{color:var(--muted);font-size:.875rem}
.notice{border-left:3px solid var(--s1);padding:.1rem 0 .1rem .9rem;margin:1.5rem 0}
.plots{display:grid;gap:1.5rem 2rem;margin-top:1rem}
@media(min-width:56rem){.plots{grid-template-columns:1fr 1fr}}
figure{margin:0;min-width:0}
.plot svg{display:block;width:100%;height:auto}
.plot svg text{font-family:var(--sans)!important}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;list-style:none;padding:0;margin:1rem 0 0;
max-width:none;font-size:.9rem}
.legend li{margin:0;display:flex;gap:.5rem;align-items:center}
.legend svg,td svg{flex:none;vertical-align:-.1em}
.legend.own{gap:.2rem 1.2rem;margin-top:.5rem;font-size:.875rem}
.legend.published{color:var(--muted);font-size:.8rem;gap:.2rem 1.1rem;margin-top:.5rem}
.code{display:inline-block;flex:none;min-width:1.2em;margin-right:.35em;font-variant-numeric:tabular-nums}
.legend .source{font-weight:600}
.legend label{display:flex;gap:.4rem;align-items:center;cursor:pointer}
.legend label>span{display:flex}
.legend input{width:.8rem;height:.8rem;margin:0;accent-color:var(--grey)}
.scroll{position:relative;overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;font-variant-numeric:tabular-nums;
width:100%}
th,td{padding:.4rem .8rem .4rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}
thead th{font-weight:600;color:var(--muted);vertical-align:bottom}
.n{text-align:right}
td.n{white-space:nowrap}
.name{min-width:13rem}
.curve{display:flex;gap:.4rem}
.curve .code{min-width:1.5em;margin:0}
.curve svg{flex:none}
.curve svg{margin-top:.22rem}
small{display:block;color:var(--muted);font-size:.8rem}
td.remark{min-width:12rem;color:var(--muted)}
tr.group td{font-weight:600;padding-top:1.1rem;white-space:nowrap}
tr.old td,tr.published td{color:var(--muted)}
.strong{font-weight:600}
code{font:.85em ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--line)}
details summary{cursor:pointer}
h4{font-size:.875rem;margin:1.2rem 0 .2rem;color:var(--ink)}
.curves{list-style:none;padding:0;display:grid;gap:.35rem 1.5rem;max-width:none;
grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr))}
.curves li{margin:0}
.anchor td{background:color-mix(in srgb,var(--line) 40%,transparent)}
.matrix{width:auto}
.matrix th,.matrix td{padding:.3rem .45rem;text-align:right;white-space:nowrap}
.matrix tbody th{position:sticky;left:0;z-index:1;background:var(--paper);text-align:left;
font-weight:400;padding-left:0}
.matrix thead th{position:sticky;top:0;background:var(--paper)}
.matrix thead th:first-child{left:0;z-index:2;text-align:left;padding-left:0}
.matrix tbody th span{display:flex;align-items:center;gap:.3rem;width:17rem}
.matrix tbody th svg{flex:none}
.matrix tbody th .code{min-width:1.5em;margin:0}
.matrix tbody th i{font-style:normal;overflow:hidden;text-overflow:ellipsis}
.matrix small{font-size:.7rem}
.matrix .better{background:color-mix(in srgb,var(--s2) 18%,transparent)}
.matrix .worse{background:color-mix(in srgb,var(--s1) 12%,transparent)}
.matrix .short,.matrix .no{color:var(--muted)}
.matrix .short{background:none}
.scroll:has(.matrix){max-height:44rem;overflow:auto}
.tabs>input{position:absolute;opacity:0}
.tabs>label{display:inline-block;padding:.25rem .7rem;margin-right:.4rem;font-size:.875rem;
border:1px solid var(--line);border-radius:1rem;cursor:pointer}
.tabs>input:checked+label{background:var(--ink);color:var(--paper);border-color:var(--ink)}
.tabs>input:focus-visible+label{outline:2px solid var(--s0);outline-offset:2px}
.tab{display:none}
#t-rate:checked~.tab:nth-of-type(1),#t-psnr:checked~.tab:nth-of-type(2){display:block}
.crops{display:grid;gap:1.2rem 1rem;margin-top:1rem;
grid-template-columns:repeat(auto-fill,minmax(min(15rem,45%),1fr))}
.crops img{display:block;width:100%;height:auto;margin-bottom:.4rem}
.crops figcaption{line-height:1.35;overflow-wrap:anywhere}
.crops .curve{color:var(--ink);font-size:.8rem;gap:.3rem}
.crops .curve>b:last-child{font-weight:500}
.runs{font-size:.8rem}
.runs th,.runs td{padding-right:.6rem}
.plain{list-style:none;padding:0;max-width:none;font-size:.875rem}
details{margin:.75rem 0}
@media(max-width:40rem){
.legend{flex-direction:column}
.cards thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.cards tr{display:grid;grid-template-columns:repeat(3,1fr);gap:.3rem .8rem;padding:.7rem 0;
border-bottom:1px solid var(--line)}
.cards td{padding:0;border:0;text-align:left;white-space:normal;min-width:0;align-self:end}
.cards td:empty{display:none}
.cards td::before{content:attr(data-of);display:block;color:var(--muted);font-size:.7rem}
.cards td.name{grid-column:1/-1;font-weight:600}
.cards td.name small{font-weight:400}
.cards td.name::before{content:none}
.cards td.remark{grid-column:1/-1}
.cards td.remark::before{display:inline;margin-right:.6em}
.cards .anchor{background:color-mix(in srgb,var(--line) 40%,transparent)}
.cards .anchor td{background:none}
.matrix tbody th span{width:auto}
.matrix tbody th i{display:none}
.runs td:first-child:not([colspan]){position:sticky;left:0;background:var(--paper);min-width:9rem;
max-width:11rem;overflow-wrap:anywhere;font-size:.8rem}
tr.group td{white-space:normal}
tr.group .curve{position:sticky;left:0;max-width:calc(100vw - 2rem)}
}
@media print{body{max-width:none}.scroll{overflow:visible}}
"""


def theme() -> str:
  """The colours as CSS variables, light and dark."""

  def variables(index: int) -> str:
    return "".join(f"--{name}:{pair[index]};" for name, pair in COLORS.items())

  return (
    f":root{{color-scheme:light dark;{variables(0)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}"
  )
