"""Draw the dashboard as one picture from Prometheus' answers to its own queries, without Grafana.

    pip install matplotlib
    python grafana/render.py http://localhost:9090 docs/images/dashboard.png --minutes 10

The layout, the titles, the units and the queries are those of dashboards/sandbox.json; only the drawing is ours.
"""

import argparse
import io
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image  # matplotlib brings it

DASHBOARD = Path(__file__).parent / "dashboards" / "sandbox.json"
VARIABLES = {"$__rate_interval": "20s", "$instance": ".+", "$template": ".+"}
POINTS = 240  # of a line
COLUMN_INCHES, ROW_INCHES = 0.62, 0.3
LOOK = {
    "figure.facecolor": "#111217",
    "axes.facecolor": "#181b1f",
    "axes.edgecolor": "#2c3235",
    "axes.prop_cycle": mpl.cycler(
        color=["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0"]
    ),
    "grid.color": "#2c3235",
    "text.color": "#ccccdc",
    "xtick.color": "#8e8e99",
    "ytick.color": "#8e8e99",
    "font.size": 6.5,
}
Series = tuple[str, list[float], list[float]]


def main() -> None:
    """Ask, draw, save."""
    parser = argparse.ArgumentParser(description="Draw the dashboard from Prometheus' answers.")
    parser.add_argument("prometheus", help="its address, such as http://localhost:9090")
    parser.add_argument("picture", help="the PNG to write")
    parser.add_argument("--minutes", type=float, default=10.0, help="how far to look back")
    options = parser.parse_args()
    end = time.time()
    begin = end - 60 * options.minutes
    dashboard = json.loads(DASHBOARD.read_bytes())
    with mpl.rc_context(LOOK):
        figure = plt.figure(figsize=(24 * COLUMN_INCHES, depth(dashboard["panels"]) * ROW_INCHES), dpi=90)
        for panel in dashboard["panels"]:
            draw(figure, panel, depth(dashboard["panels"]), options.prometheus, begin, end)
        save(figure, options.picture)


def save(figure: Any, path: str) -> None:
    """Save with few colours: a third of the size."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png")
    Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def depth(panels: list[dict[str, Any]]) -> int:
    """Return how many of the grid's rows the dashboard has."""
    return max(int(panel["gridPos"]["y"] + panel["gridPos"]["h"]) for panel in panels)


def draw(figure: Any, panel: dict[str, Any], rows: int, address: str, begin: float, end: float) -> None:
    """Draw one panel at its place."""
    place = panel["gridPos"]
    left, top = place["x"] / 24, 1 - place["y"] / rows
    if panel["type"] == "row":
        figure.text(0.006, top - 0.7 / rows, panel["title"], fontsize=9, weight="bold")
        return
    width, height = place["w"] / 24, place["h"] / rows
    figure.text(left + 0.008, top - 0.75 / rows, panel["title"], fontsize=7.5)
    found = [one for target in panel["targets"] for one in ask(address, target, begin, end)]
    show = unit(panel["fieldConfig"]["defaults"].get("unit", "s"))
    if panel["type"] == "stat":
        draw_stat(figure, panel, found, show, left + width / 2, top - 0.6 * height)
        return
    axes = figure.add_axes((left + 0.036, top - height + 1.75 / rows, width - 0.045, height - 2.9 / rows))
    axes.set_xlim(begin, end)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: time.strftime("%H:%M", time.gmtime(at))))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(visible=True, linewidth=0.4)
    axes.tick_params(length=0)
    if panel["type"] == "heatmap":
        draw_heatmap(axes, found, show)
    else:
        draw_lines(axes, panel, found, show)


def draw_stat(
    figure: Any, panel: dict[str, Any], found: list[Series], show: Callable[[float], str], x: float, y: float
) -> None:
    """Write the last value, in the colour of its threshold."""
    defaults = panel["fieldConfig"]["defaults"]
    value = found[0][2][-1]
    words = {key: word for mapping in defaults.get("mappings", ()) for key, word in mapping["options"].items()}
    steps = defaults.get("thresholds", {"steps": [{"color": "green", "value": None}]})["steps"]
    colour = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
    text = words[f"{value:g}"]["text"] if f"{value:g}" in words else show(value)
    colours = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c"}
    figure.text(x, y, text, fontsize=17, ha="center", va="center", color=colours[colour])


def draw_lines(axes: Axes, panel: dict[str, Any], found: list[Series], show: Callable[[float], str]) -> None:
    """Draw lines, or areas on top of each other."""
    defaults = panel["fieldConfig"]["defaults"]
    if "stacking" in defaults["custom"]:
        times = sorted({at for _, at_times, _ in found for at in at_times})
        by_time = [dict(zip(at_times, values, strict=True)) for _, at_times, values in found]
        axes.stackplot(
            times, [[one.get(at, 0.0) for at in times] for one in by_time], labels=[f[0] for f in found], alpha=0.6
        )
    else:
        for legend, times, values in found:
            axes.plot(times, values, label=legend, linewidth=0.9)
    axes.set_ylim(bottom=0, top=1.05 if defaults.get("max") == 1 and "Open" not in panel["title"] else None)
    if axes.get_ylim()[1] < 1e-9 or (found and all(max(values) == 0 for _, _, values in found)):
        axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.1, -0.1),
        ncols=5,
        frameon=False,
        fontsize=5.5,
        columnspacing=1,
        handlelength=1,
    )


def draw_heatmap(axes: Axes, found: list[Series], show: Callable[[float], str]) -> None:
    """Colour each bucket by how many fell into it: the difference to the next smaller one."""
    buckets = sorted(found, key=lambda one: float(one[0]))
    times = buckets[0][1]
    columns = [dict(zip(at_times, values, strict=True)) for _, at_times, values in buckets]
    totals = [[column.get(at, 0.0) for at in times] for column in columns]
    counts = [totals[0]] + [
        [max(0.0, high - low) for high, low in zip(*pair, strict=True)]
        for pair in zip(totals[1:], totals, strict=False)
    ]
    shaded = [[math.sqrt(value) if value > 0 else math.nan for value in row] for row in counts]
    axes.pcolormesh(times, range(len(buckets)), shaded, cmap="YlGnBu_r", shading="nearest")
    labels = [show(float(one[0])) if one[0] != "+Inf" else "inf" for one in buckets]
    axes.set_yticks(range(0, len(buckets), 3), labels[::3])


def ask(address: str, target: dict[str, Any], begin: float, end: float) -> list[Series]:
    """Return legend, times and values of each series of a query; what is no number is left out."""
    query = target["expr"]
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    step = max(5.0, (end - begin) / POINTS)
    words = urllib.parse.urlencode({"query": query, "start": begin, "end": end, "step": step})
    with urllib.request.urlopen(f"{address}/api/v1/query_range?{words}", timeout=30) as answer:  # noqa: S310 - the address is the caller's
        result = json.load(answer)["data"]["result"]
    found = []
    for one in result:
        legend = target["legendFormat"]
        for label, value in one["metric"].items():
            legend = legend.replace("{{" + label + "}}", value)
        legend = re.sub(r"\{\{.*?\}\}", "all", legend)
        points = [(float(at), float(value)) for at, value in one["values"] if math.isfinite(float(value))]
        if points:
            found.append((legend, [at for at, _ in points], [value for _, value in points]))
    return found


def unit(name: str) -> Callable[[float], str]:
    """Return how a unit of Grafana's is written."""

    def seconds(value: float) -> str:
        for size, word in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
            if abs(value) >= size:
                return f"{value / size:.3g} {word}"
        return "0" if value == 0 else f"{value * 1e3:.2g} ms"

    shown: dict[str, Callable[[float], str]] = {
        "s": seconds,
        "percentunit": lambda value: f"{value:.3%}" if 0 < value < 0.01 else f"{value:.0%}",
        "bytes": lambda value: f"{value / 2**20:.0f} MiB",
        "Bps": lambda value: f"{value / 1024:.3g} KiB/s" if value >= 1024 else f"{value:.3g} B/s",
        "reqps": lambda value: f"{value:.3g}/s",
    }
    return shown.get(name, lambda value: f"{value:.3g}")


if __name__ == "__main__":
    main()
