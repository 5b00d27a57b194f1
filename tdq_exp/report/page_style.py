"""The look of `results/report.html`: light and dark, on a phone and on a wide screen."""

STYLE = """
:root {
  color-scheme: light dark;
  --text: #1b1b1b; --back: #ffffff; --soft: #f3f4f6; --line: #c9ccd1; --quiet: #55595f;
  --link: #0b57a4; --good: #14602b; --bad: #a3201d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e8e8e8; --back: #14161a; --soft: #1f2228; --line: #43474e; --quiet: #aab0b8;
    --link: #8ab8f0; --good: #7bd197; --bad: #ff9a94;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif;
}
h1, h2, h3, h4 { line-height: 1.2; scroll-margin-top: 1rem; }
h2 { margin-top: 3rem; border-bottom: 2px solid var(--line); padding-bottom: .3rem; }
h3 { margin-top: 2.5rem; }
h4 { margin: 2rem 0 .5rem; font-size: 1.0625rem; }
p, li, figcaption { max-width: 46rem; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible {
  outline: 3px solid var(--link); outline-offset: 2px;
}
.skip { position: absolute; left: -999px; }
.skip:focus { position: static; }
nav ul { margin: .4rem 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; }
nav ul { gap: .1rem 1rem; }
nav li a { display: inline-block; padding: .25rem 0; }
nav li strong { display: inline-block; min-width: 4rem; padding: .25rem 0; }
.up { font-size: .875rem; text-align: right; max-width: none; }
details { margin: .5rem 0; }
summary { cursor: pointer; padding: .25rem 0; }
code { font: .875em/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
td, tbody th { vertical-align: top; }
thead th { vertical-align: bottom; background: var(--soft); min-width: 3.5rem; }
tbody th { background: var(--back); font-weight: 500; position: sticky; left: 0; }
tbody th { min-width: 7rem; max-width: 24rem; }
tr.group > * { border-top: 2px solid var(--quiet); }
.long { min-width: 15rem; }
tbody th.long { min-width: 10rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.missing { color: var(--quiet); font-style: italic; }
.notes { font-size: .8125rem; color: var(--quiet); padding-left: 1.2rem; }
td code, .rows td { white-space: nowrap; }
.rows th a { overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figure svg { display: block; width: 100%; height: auto; color: var(--text); }
figure svg text { fill: currentColor; }
figcaption { font-size: .875rem; color: var(--quiet); margin-top: .5rem; }
.strip { margin: .6rem 0; }
.strip span { display: block; font-size: .875rem; position: sticky; left: 0; width: max-content; }
.strip img {
  display: block; width: 100%; min-width: 34rem; max-width: 64rem; image-rendering: pixelated;
}
.holds { color: var(--good); font-weight: 600; }
.fails { color: var(--bad); font-weight: 600; }
@media (max-width: 40rem) { tbody th { max-width: 9rem; } tbody th.long { min-width: 8rem; } }
@media (min-width: 60rem) { .rows tbody th { min-width: 16rem; } }
@media print { .scroll { overflow: visible; } tbody th { position: static; } }
"""
