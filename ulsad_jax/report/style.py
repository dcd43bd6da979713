"""Defines the report's style sheet: system fonts, light and dark, wide and narrow."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --panel: #f5f6f8; --text: #1c1f24; --faint: #646b76;
  --rule: #dfe2e7; --link: #0b57c4; --bad: #b3261e; --good: #1b6e3c;
  --warn: #fdecea; --note: #eef3fb; --normal: #2f76c9; --defect: #d9601a;
  --c0: #1f6fc5; --c1: #d9601a; --c2: #1b8a5a; --c3: #b0479b;
  --c4: #8a6d00; --c5: #0f8fa8; --c6: #c0392b; --c7: #5c6470;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --panel: #1e2127; --text: #e6e8ec; --faint: #9aa2ae;
    --rule: #343943; --link: #8ab8ff; --bad: #ff8a80; --good: #7fd6a2;
    --warn: #4a1f1c; --note: #1d2a40; --normal: #6aa8f0; --defect: #f39a5c;
    --c0: #6aa8f0; --c1: #f39a5c; --c2: #5fcf9c; --c3: #e28fd0;
    --c4: #e0c050; --c5: #5ccbe0; --c6: #ff8074; --c7: #aab2be;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; margin: 8px 0; }
h2 { font-size: 1.15rem; margin: 32px 0 8px; }
h3 { font-size: 1rem; margin: 24px 0 4px; }
p { margin: 4px 0 12px; max-width: 75ch; }
a { color: var(--link); }
nav a { display: inline-block; margin: 4px 12px 4px 0; }
section { border-top: 1px solid var(--rule); margin-top: 32px; }
section > h2 { margin-top: 16px; font-size: 1.3rem; }
.small { color: var(--faint); font-size: .85rem; margin-top: 8px; }
.warning, .note { padding: 10px 14px; border-radius: 6px; background: var(--note); }
.warning { background: var(--warn); border-left: 5px solid var(--bad); }
.chips { display: flex; flex-wrap: wrap; gap: 6px; padding: 0; list-style: none; }
.chips li { background: var(--panel); border-radius: 6px; padding: 3px 10px; }
.chips span { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td {
  padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap;
}
th { color: var(--faint); font-weight: 500; }
th:first-child, td:first-child {
  text-align: left; position: sticky; left: 0; background: var(--page);
  max-width: 55vw; white-space: normal; min-width: 7em;
}
details { margin: 12px 0; }
details td { white-space: normal; }
summary { cursor: pointer; font-weight: 600; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: 10px; }
figcaption { font-weight: 600; }
.figures, .gallery { display: grid; gap: 12px; align-items: start; }
.figures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.gallery { grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 11px; }
svg .name {
  fill: var(--text); paint-order: stroke; stroke: var(--panel); stroke-width: 4px;
}
.grid, .base { stroke: var(--rule); fill: none; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 6 4; }
.dot { fill: var(--c); }
rect.normal { fill: var(--normal); }
rect.defect { fill: var(--defect); }
.threshold { stroke: var(--text); stroke-dasharray: 4 3; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 0; padding: 0;
  list-style: none; font-size: .85rem;
}
.legend i {
  display: inline-block; width: 16px; border-top: 3px solid var(--c);
  margin-right: 6px; vertical-align: middle;
}
.legend i.dashed { border-top-style: dashed; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.card img { display: block; width: 100%; height: auto; border-radius: 4px; }
.card figcaption { font-weight: 400; font-size: .85rem; margin-top: 6px; }
.card .file { font-weight: 600; margin-right: 6px; }
.card .scores { display: block; color: var(--faint); }
.terms { display: flex; height: 6px; margin-top: 4px; }
.terms i { background: var(--c); }
.card b { border-radius: 4px; padding: 1px 6px; color: var(--page); }
.card b.wrong { background: var(--bad); }
.card b.right { background: var(--good); }
@media print { .card, figure { break-inside: avoid; } }
"""
