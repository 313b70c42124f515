"""The style of a run's report: light and dark, for a phone and for paper. Called from: `cli.page`."""

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --text: #1c1f23; --quiet: #5b636d; --line: #dfe2e6;
  --trained: #2e8b57; --retrained: #d1571b; --stalled: #c99a06; --waited: #8a5cc2; --restoring: #2f7fc1; --down: #a4abb3; --mark: #1c1f23; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2125; --text: #e7e9ec; --quiet: #a0a8b1; --line: #343a41;
  --trained: #4bb37b; --retrained: #f0803f; --stalled: #e2b93b; --waited: #b08be6; --restoring: #5aa7e4; --down: #6b747d; --mark: #e7e9ec; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.35rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
p { margin: 0 0 .6rem; }
.quiet { color: var(--quiet); font-size: .875rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin: 1rem 0; }
section > :last-child { margin-bottom: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
.figure b { display: block; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.figure.main b { font-size: 2.4rem; }
.figure span { color: var(--quiet); font-size: .85rem; }
svg { display: block; width: 100%; }
svg.bar { height: 1.75rem; border-radius: .3rem; }
svg.rows { height: auto; min-height: 1.5rem; }
svg.columns { height: 7rem; }
.trained { fill: var(--trained); } .retrained { fill: var(--retrained); } .stalled { fill: var(--stalled); }
.waited { fill: var(--waited); } .restoring { fill: var(--restoring); } .down { fill: var(--down); }
.mark { stroke: var(--mark); stroke-width: 1.5; vector-effect: non-scaling-stroke; } .axis { stroke: var(--line); vector-effect: non-scaling-stroke; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .45em; vertical-align: -.05em; }
.key.trained { background: var(--trained); } .key.retrained { background: var(--retrained); } .key.stalled { background: var(--stalled); }
.key.waited { background: var(--waited); } .key.restoring { background: var(--restoring); } .key.down { background: var(--down); }
.key.mark { background: var(--mark); width: .15em; border-radius: 0; margin: 0 .6em 0 .15em; }
.ends { display: flex; justify-content: space-between; gap: 1rem; color: var(--quiet); font-size: .8rem; margin: .3rem 0 .6rem; }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: 0 0 .6rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 1.25rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; margin-top: .75rem; }
th { text-align: left; font-weight: 600; color: var(--quiet); white-space: nowrap; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.t { white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1rem; margin: 0; font-size: .875rem; }
dt { font-weight: 600; } dd { margin: 0; color: var(--quiet); }
ul { margin: 0; padding-left: 1.1rem; }
@media print { section { break-inside: avoid; } body { background: none; } }
"""
