"""One self-contained HTML page from result files: every table, and a plot for every figure that several cases have.

Needs matplotlib (`pip install 'deltamux[bench]'`). Takes seconds.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.figure import Figure

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>deltamux benchmarks</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ccc; padding: .2rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
small { color: #555; } img { max-width: 100%; }
</style></head><body>
<h1>deltamux benchmarks</h1>
<p>Medians with minimum and maximum over the rounds; ratios are formed within a round.</p>
{% for result in results %}
<h2>{{ result.title }}</h2>
<p><small>{{ result.file }} · <code>{{ result.environment.command }}</code><br>
{% for key, value in result.environment.items() if key != "command" and value is not none -%}
{{ key }} {{ value }}{{ ", " if not loop.last }}
{%- endfor %}</small></p>
<table><tr><th>case</th>{% for name in result.names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for record in result.records %}<tr><td>{{ record.label }}</td>
{% for name in result.names %}<td>{{ cell(record, name) }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for plot in result.plots %}<img alt="{{ plot.name }}" src="data:image/png;base64,{{ plot.png }}">
{% endfor %}{% endfor %}
</body></html>
"""


def main(argv: Sequence[str]) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m loadtest report", description=__doc__)
    parser.add_argument(
        "results", nargs="*", type=Path, help="result files (default: loadtest/results/*.json)"
    )
    parser.add_argument("--out", type=Path, default=Path("loadtest/results/report.html"))
    args = parser.parse_args(argv)
    paths = args.results or sorted((Path(__file__).parent / "results").glob("*.json"))
    args.out.write_text(render(paths), encoding="utf-8")
    print(f"{args.out}: {len(paths)} results")


def render(paths: Sequence[Path]) -> str:
    """The page of these result files."""
    results = []
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        records = result["records"]
        names = list(dict.fromkeys(n for r in records for n in (*r["values"], *r["facts"])))
        plotted = [n for n in names if sum(n in r["values"] for r in records) > 1]
        plots = [{"name": name, "png": plot(name, records)} for name in plotted]
        results.append({**result, "file": path.name, "names": names, "plots": plots})
    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(results=results, cell=_cell)


def plot(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each record that has the figure, with its minimum and maximum; PNG in base64."""
    having = [record for record in records if name in record["values"]]
    spreads = [record["values"][name] for record in having]
    medians = [spread["median"] for spread in spreads]
    errors = [
        [spread["median"] - spread["low"] for spread in spreads],
        [spread["high"] - spread["median"] for spread in spreads],
    ]
    figure = Figure(figsize=(9, 0.8 + 0.28 * len(having)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(having)), medians, xerr=errors, color="#4c78a8", ecolor="#333", capsize=2)
    axes.set_yticks(range(len(having)), [record["label"] for record in having], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(name)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode()


def _cell(record: Mapping[str, Any], name: str) -> str:
    if name in record["values"]:
        spread = record["values"][name]
        if spread["low"] == spread["high"]:
            return f"{spread['median']:.4g}"
        return f"{spread['median']:.4g} ({spread['low']:.4g}-{spread['high']:.4g})"
    fact = record["facts"].get(name, "")
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact)
