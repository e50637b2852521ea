"""The page around a comparison's report: light, dark, on paper, and on a telephone."""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--deep:#1f5fa8}
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}h3{font-size:1rem}
.conclusion{font-size:1.05rem;border-left:.3rem solid var(--deep);padding:.1rem 0 .1rem .8rem}
.conclusion p{margin:.5rem 0}
.quiet{opacity:.75;font-size:.9rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{border:1px solid var(--line);padding:.25rem .6rem;text-align:right;overflow-wrap:normal}
th[scope=row],thead th:first-child{text-align:left}thead th{background:var(--soft)}td{white-space:nowrap}
td small{display:block;opacity:.75}u{text-decoration-thickness:2px;text-underline-offset:3px}
.matrix td{background:color-mix(in srgb,var(--deep) calc(var(--share,0%)*.55),transparent)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:1rem}
figure{margin:0;break-inside:avoid}
figure img{width:100%;image-rendering:pixelated;border:1px solid var(--line);background:#000}
svg{width:100%;max-width:1000px;height:auto;font-size:12px}svg text{fill:currentColor}
@media(max-width:600px){svg{min-width:460px;font-size:18px}}details{margin-top:2rem}
pre{overflow:auto;font-size:.8rem}
@media print{body{max-width:none;padding:0;font-size:10pt;color-scheme:light}.wide{overflow:visible}
 td{white-space:normal}h2,h3{break-after:avoid}tr,svg{break-inside:avoid}td small{white-space:normal}
 .matrix td,.figures img{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
