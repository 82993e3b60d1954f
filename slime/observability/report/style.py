"""The report's style sheet: light and dark after the reader's setting, light on paper."""

_LIGHT = """
  --page: #fbfbfa; --card: #ffffff; --ink: #1d2026; --soft: #646b78; --rule: #e4e6ea; --tint: #dcebfd; --grey: #ececee;
  --c0: #2563c9; --c1: #d9730d; --c2: #2b8a55; --c3: #8b53c6;
  --c4: #c93a4b; --c5: #128a95; --c6: #9a7b1c; --c7: #7a828f;
"""
_DARK = """
  --page: #14161a; --card: #1c1f25; --ink: #e6e8ec; --soft: #9aa2af; --rule: #30343c; --tint: #203a5c; --grey: #2f333b;
  --c0: #6ea5f7; --c1: #f2a154; --c2: #5fc48d; --c3: #bb90ec;
  --c4: #f0808c; --c5: #4fc3cd; --c6: #d3b34d; --c7: #9aa2af;
"""
_RULES = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 40px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Inter, Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; letter-spacing: -.005em; }
h3 { font-size: 14px; margin: 0 0 2px; }
h2 + h3, .note + h3 { margin: 14px 0 8px; }
.lead, .note, .missing, footer { color: var(--soft); }
.lead { margin: 6px 0 24px; }
.note { font-size: 12.5px; line-height: 1.4; margin: 6px 0 0; }
.missing { font-size: 13px; }
footer { font-size: 12.5px; margin-top: 48px; border-top: 1px solid var(--rule); padding-top: 12px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px;
  margin: 0 0 16px;
  break-inside: avoid; min-width: 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 16px; }
.tile { flex: 1 1 auto; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 16px;
  break-inside: avoid; }
.tile small { display: block; color: var(--soft); font-size: 12.5px; }
.tile b { font-size: 21px; font-weight: 650; font-variant-numeric: tabular-nums; letter-spacing: -.01em;
  white-space: nowrap; }
.grid3 { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 16px; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; align-items: start; }
.grid3 .card, .grid2 .card { margin: 0; }
.grid2 { margin-bottom: 16px; }
@media (max-width: 520px) { .grid3, .grid2 { grid-template-columns: 1fr; } body { padding: 20px 12px; } }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--soft); margin-bottom: 6px; }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px;
  background: currentColor; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.tick { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.tick.strong { fill: var(--ink); }
.value { font-size: 12px; font-weight: 650; fill: currentColor; }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; } .axis { stroke: var(--soft); stroke-width: 1;
  fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.faint { stroke-width: 1; opacity: .35; }
.band { fill: currentColor; opacity: .12; } .dot { fill: currentColor; stroke: var(--card); stroke-width: 1.2; }
.fill { fill: currentColor; } .hover { fill: transparent; } .inside { font-size: 11px; fill: var(--card); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
table { border-collapse: collapse; width: 100%; font-size: 13px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); } th, td { padding: 4px 8px 4px 0; }
td { border-top: 1px solid var(--rule); } .phases td + td, .phases th + th { text-align: right; }
.phases td:last-child, .phases th:last-child { text-align: left; padding-left: 16px; width: 120px; }
.share { display: inline-block; height: 9px; background: currentColor; border-radius: 2px; margin-right: 6px; }
.sample { padding: 12px 14px; } .facts { margin: 0 0 8px; font-size: 12.5px; color: var(--soft); }
.facts b { color: var(--ink); }
.facts .pick { border-radius: 4px; padding: 1px 7px; color: var(--card); background: var(--c7); }
.facts .best { background: var(--c2); } .facts .worst { background: var(--c4); } .failure { color: var(--c4);
  margin: 0 0 8px; }
pre, code { font: 12.5px/1.65 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 420px; overflow-y: auto; }
.prompt { color: var(--soft); border-left: 2px solid var(--rule); padding-left: 10px; margin-bottom: 8px; }
.tok { border-radius: 2px; padding: 1px 0; box-shadow: inset -1px 0 0 var(--card); }
.tok.on { background: var(--tint); } .tok.off { background: var(--grey); color: var(--soft); }
.omitted { color: var(--soft); font-style: italic; }
details { margin: 16px 0; } summary { cursor: pointer; color: var(--soft); margin-bottom: 10px; }
@media print { body { max-width: none; padding: 0; font-size: 12px; } pre { max-height: none; }
  .tile b { font-size: 16px; } .phases { font-size: 11px; }
h2 { break-after: avoid; }
  .grid3 { grid-template-columns: repeat(3, 1fr); } .grid2 { grid-template-columns: repeat(2, 1fr); } }
"""

STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
@media print {{ :root {{ color-scheme: light; {_LIGHT} --page: #fff; }} * {{ print-color-adjust: exact; }} }}
{_RULES}"""
