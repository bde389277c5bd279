"""Perplexity against cost: one drawing from the rows of bench_quality.py, mean over seeds.

    python benchmarks/plot_quality.py benchmarks/results/quality*.jsonl --model smollm2 --out docs/quality-cost.svg

Cost is the method's FLOPs, which no machine changes; the upper axis gives the minutes these take at --gflops. The dense
model is a line; points that nothing cheaper beats are joined.
"""

import argparse
import json
import statistics
from fnmatch import fnmatchcase
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from wandapp.plots import SERIES, SOFT, draw, svg

TITLES = {"0.5": "50 %"}
USUAL_SAMPLES = 64  # of calibration; other numbers are written out
Points = dict[str, tuple[float, float]]  # method -> TFLOP, perplexity


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, help=".jsonl files of bench_quality.py")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"], help="one panel each")
    parser.add_argument("--gflops", type=float, default=150, help="rate for the axis of minutes [two CPU cores: 150]")
    usual = ["magnitude", "sparsegpt+ro", "wanda+ro", "wanda@allocate=*", "*@reconstruct_*", "*best,self_samples=0,*"]
    usual += ["*self_temperature=1", "sparsegpt@self_samples=*"]
    parser.add_argument("--leave-out", nargs="*", default=usual, help="methods, with * for any characters")
    parser.add_argument("--out", type=Path, required=True, help=".svg or .png")
    return parser.parse_args()


def is_left_out(method: str, arguments: argparse.Namespace) -> bool:
    return any(fnmatchcase(method, pattern) for pattern in arguments.leave_out)


def label_of(row: dict) -> str:
    method, _, options = row["method"].partition("@")
    if "preset=best" in options:
        method, options = "preset best", options.removeprefix("preset=best").removeprefix(",")
    options = (
        options.replace("self_samples=0", "no own text")
        .replace("preset=paper", "as published")
        .replace("reconstruct_", "")
        .replace(",", ", ")
    )
    samples = "" if row["samples"] == USUAL_SAMPLES else f"\n{row['samples']} samples"
    return method + (options and ("\n" if len(options) > 20 else ", ") + options) + samples


def points_of(rows: list[dict], pattern: str, text: str) -> Points:
    """Of every label: the FLOPs, and the geometric mean of the seeds' perplexities."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["pattern"] == pattern and row.get("gflop") and text in row["perplexity"]:
            groups.setdefault(label_of(row), []).append(row)
    return {
        label: (group[0]["gflop"] / 1e3, statistics.geometric_mean(row["perplexity"][text] for row in group))
        for label, group in groups.items()
    }


def panel(axes: Axes, points: Points, dense: float, title: str, gflops: float) -> None:
    """Perplexity over TFLOP, both logarithmic, with the minutes above and the points that nothing beats joined."""
    best: list[tuple[float, float]] = []
    for cost, perplexity in sorted(points.values()):
        if not best or perplexity < best[-1][1]:
            best.append((cost, perplexity))
    axes.plot(*zip(*best, strict=True), color=SOFT, linewidth=0.8, linestyle=":")
    axes.axhline(dense, color=SOFT, linewidth=0.8)
    axes.annotate(
        "dense", (1, dense), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right"
    )
    for label, point in points.items():
        color = SERIES[0] if point in best else SERIES[1]
        axes.plot(*point, "o", color=color, markersize=4)
        below = "\n" in label
        place = {"xytext": (4, -3 if below else 3), "va": "top" if below else "baseline"}
        axes.annotate(label, point, **place, textcoords="offset points", fontsize=7, color=color)
    axes.set(xscale="log", yscale="log", title=title, xlabel="TFLOP", ylabel="perplexity")
    axes.set_xlim(right=3.5 * max(cost for cost, _ in points.values()))
    per_minute = gflops * 60 / 1e3
    minutes = axes.secondary_xaxis("top", functions=(lambda x: x / per_minute, lambda x: x * per_minute))
    minutes.set_xlabel(f"minutes at {gflops:g} GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis, minutes.xaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def main() -> None:
    arguments = parse_arguments()
    rows = [json.loads(line) for path in arguments.rows for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["model"] == arguments.model and not is_left_out(row["method"], arguments)]
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    text = next(iter(dense))

    def panels(axes: Axes) -> None:
        figure = axes.figure
        axes.remove()
        for position, pattern in enumerate(arguments.patterns):
            title = f"{arguments.model}, {TITLES.get(pattern, pattern)}, {text}"
            here = figure.add_subplot(1, len(arguments.patterns), position + 1)
            panel(here, points_of(rows, pattern, text), dense[text], title, arguments.gflops)

    figure = draw(panels, size=(5.2 * len(arguments.patterns), 4.2))
    figure.set_facecolor("white")
    if arguments.out.suffix == ".svg":
        arguments.out.write_text(svg(figure), encoding="utf-8")
    else:
        figure.savefig(arguments.out, dpi=120)
    print(json.dumps({"rows": len(rows), "out": str(arguments.out)}))


if __name__ == "__main__":
    main()
