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
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-bottom: 2px solid var(--line); padding-bottom: .3rem; }
h3 { margin-top: 2rem; }
p, li, figcaption, summary { max-width: 46rem; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible {
  outline: 3px solid var(--link); outline-offset: 2px;
}
.skip { position: absolute; left: -999px; }
.skip:focus { position: static; }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; }
code { font: .875em/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--soft); padding: .6rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
th { vertical-align: bottom; background: var(--soft); }
tbody th { background: none; font-weight: 500; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.missing { color: var(--quiet); font-style: italic; }
.notes { font-size: .8125rem; color: var(--quiet); }
figure { margin: 1.5rem 0; }
figure svg { display: block; width: 100%; min-width: 44rem; height: auto; color: var(--text); }
figure svg text { fill: currentColor; }
figure .narrow svg { max-width: 56rem; min-width: 30rem; }
figcaption { font-size: .875rem; color: var(--quiet); }
.strip { margin: .6rem 0; }
.strip span { display: block; font-size: .875rem; }
.strip img {
  display: block; width: 100%; min-width: 34rem; max-width: 64rem; image-rendering: pixelated;
}
.holds { color: var(--good); font-weight: 600; }
.fails { color: var(--bad); font-weight: 600; }
@media print { .scroll { overflow: visible; } details { display: block; } }
"""
