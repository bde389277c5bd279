"""The report's plots, as matplotlib figures. They know runs, not HTML.

Colours are those of the light theme; `themed_svg` replaces each by a CSS variable of the page, so that one drawing
serves light, dark and paper.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wandapp import histograms
from wandapp.runs import Run

INK, SOFT, LINE, PAPER = "#1c2526", "#5f6d6e", "#d9e0df", "#fefefe"
SERIES = ("#0f766e", "#c2410c", "#4f46e5", "#a21caf", "#4d7c0f", "#0369a1", "#be123c", "#92722a")
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", PAPER: "paper"} | {c: f"s{i + 1}" for i, c in enumerate(SERIES)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "wandapp",
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
    "legend.labelcolor": SOFT,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def draw(plot: Callable[..., None], *arguments: Any, size: tuple[float, float] = (5.6, 3.1)) -> Figure:
    """The figure on whose axes `plot(axes, *arguments)` has drawn."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure.subplots(), *arguments)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG document, the same bytes every time."""
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def themed_svg(document: str, title: str) -> str:
    """The document as an element of a page whose CSS names the colours: --ink, --soft, --line, --paper, --s1 to --s8."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.S)
    for colour, name in _VARIABLES.items():
        element = element.replace(colour, f"var(--{name})")
    return element.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def coloured(runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
    """Each run with its colour, the same in every plot; the dense model is grey."""
    pruned = [run for run in runs if not run.is_dense]
    for run in runs:
        yield run, SOFT if run.is_dense else SERIES[pruned.index(run) % len(SERIES)]


def block_errors(axes: Axes, runs: Sequence[tuple[Run, str]]) -> None:
    """Relative error of each block's outputs; dotted: before a refiner. Runs come with their colours."""
    for run, colour in runs:
        blocks = run.prune["blocks"]
        axes.plot([_number(block["error"]) for block in blocks], color=colour, label=run.name)
        before = [_number(block.get("error_before")) for block in blocks]
        if any(numpy.isfinite(before)):
            axes.plot(before, color=colour, linestyle=":", linewidth=1.2)
    axes.set(xlabel="block", ylabel="relative error of its outputs", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def block_sparsity(axes: Axes, runs: Sequence[tuple[Run, str]]) -> None:
    """Share of zeros in the prunable weights of each block, in percent."""
    for run, colour in runs:
        shares = [100 * block["zeros"] / max(block["weights"], 1) for block in run.prune["blocks"]]
        axes.plot(shares, color=colour, label=run.name, drawstyle="steps-mid")
    axes.set(xlabel="block", ylabel="zeros, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def layer_errors(axes: Axes, run: Run, highest: float) -> None:
    """Relative error of every linear map, by its name in the block (down) and block (across); of experts the largest.

    highest  the scale's end, one for all runs that are to be compared
    """
    blocks = run.prune["blocks"]
    names = list(dict.fromkeys(_short(name, block) for block in blocks for name in block["layer_errors"]))
    values = numpy.full((len(names), len(blocks)), numpy.nan)
    for column, block in enumerate(blocks):
        for name, error in block["layer_errors"].items():
            row = names.index(_short(name, block))
            values[row, column] = numpy.fmax(values[row, column], _number(error))
    mesh = axes.pcolormesh(
        values, cmap="viridis", vmin=0, vmax=highest, edgecolors="face", linewidth=0.3, rasterized=values.size > 5000
    )
    axes.set_yticks(numpy.arange(len(names)) + 0.5, names)
    shown = numpy.arange(0, len(blocks), max(1, len(blocks) // 8))
    axes.set_xticks(shown + 0.5, shown)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel="block")
    bar = axes.figure.colorbar(mesh, ax=axes, label="relative error of x W^T")
    bar.outline.set_visible(False)


def seconds_by_phase(axes: Axes, runs: Sequence[Run]) -> None:
    """Where the time went."""
    pruned = [run for run in runs if run.prune and run.prune.get("seconds_by_phase")]
    phases = list(dict.fromkeys(phase for run in pruned for phase in run.prune["seconds_by_phase"]))
    left = numpy.zeros(len(pruned))
    for index, phase in enumerate(phases):
        seconds = numpy.array([run.prune["seconds_by_phase"].get(phase, 0.0) for run in pruned])
        axes.barh(
            [run.name for run in pruned], seconds, left=left, label=phase, color=SERIES[index % len(SERIES)], height=0.6
        )
        left += seconds
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="seconds")
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


def rates(axes: Axes, runs: Sequence[Run]) -> None:
    """FLOP rate of the whole run, beside what a plain matrix product reached on the machine during it."""
    pruned = [run for run in runs if run.prune and run.prune.get("matmul_gflops")]
    names = [run.name for run in pruned]
    axes.barh(
        names, [run.prune["matmul_gflops"] for run in pruned], color=LINE, height=0.6, label="a plain matrix product"
    )
    achieved = [run.prune["achieved_gflops"] or 0.0 for run in pruned]
    bars = axes.barh(names, achieved, color=SERIES[0], height=0.32, label="the whole run")
    shares = [f"{rate / run.prune['matmul_gflops']:.0%}" for rate, run in zip(achieved, pruned, strict=True)]
    axes.bar_label(bars, shares, padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="GFLOP/s")
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1))


def weight_histogram(axes: Axes, run: Run) -> None:
    """Weights before, and the non-zero ones after, over all blocks."""
    before, after = (_counts(run, f"weights_{when}") for when in ("before", "after"))
    edges = numpy.linspace(*histograms.WEIGHT_RANGE, histograms.BINS + 1)
    axes.stairs(after, edges, fill=True, color=SERIES[0], alpha=0.55, label="after, non-zeros")
    axes.stairs(before, edges, color=INK, linewidth=1.2, label="before")
    axes.set(xlabel="weight / RMS of its matrix", ylabel="sampled weights")
    axes.legend()


def score_histogram(axes: Axes, run: Run) -> None:
    """Scores of removed and of kept weights, over all blocks."""
    removed, kept = (_counts(run, f"scores_{fate}") for fate in ("removed", "kept"))
    edges = numpy.linspace(*histograms.SCORE_RANGE, histograms.BINS + 1)
    axes.stairs(removed, edges, fill=True, color=SERIES[1], alpha=0.45, label="removed")
    axes.stairs(kept, edges, fill=True, color=SERIES[0], alpha=0.55, label="kept")
    axes.set(xlabel="log10 of score / mean score of its matrix", ylabel="sampled weights")
    axes.legend(loc="upper left")


def tradeoff(axes: Axes, points: Sequence[tuple[str, str, float, float]], label: str, text: str) -> None:
    """Perplexity against size or speed; points are (name, colour, x, perplexity)."""
    for _, colour, x, y in points:
        axes.scatter([x], [y], color=colour, s=36, zorder=3)
    axes.margins(0.18)
    figure = cast(Figure, axes.figure)
    figure.draw_without_rendering()  # places are known from here on
    height, pixels = -numpy.inf, figure.dpi / 72
    for name, _, x, y in sorted(points, key=lambda point: point[3]):
        wanted = axes.transData.transform((x, y))[1] + 4 * pixels
        height = max(wanted, height + 11 * pixels)  # labels of neighbours stand above each other
        lift = (height - wanted) / pixels + 4
        axes.annotate(name, (x, y), xytext=(7, lift), textcoords="offset points", fontsize=8)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set(xlabel=label, ylabel=f"perplexity, {text}")


def sensitivity(axes: Axes, series: Sequence[tuple[str, str, list[tuple[int, float]]]], label: str) -> None:
    """A figure against the number of calibration samples; series are (name, colour, [(samples, figure)])."""
    for name, colour, points in series:
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=5, label=name)
    ticks = sorted({samples for _, _, points in series for samples, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="calibration samples", ylabel=label)
    axes.legend()


def losses(axes: Axes, run: Run) -> None:
    """Training loss of recovery, and its mean over the last tenth so far."""
    values = numpy.array([step["loss"] for step in run.losses])
    width = max(1, len(values) // 10)
    smooth = numpy.convolve(values, numpy.ones(width) / width, mode="valid")
    axes.plot(values, color=LINE, linewidth=1)
    axes.plot(numpy.arange(width - 1, len(values)), smooth, color=SERIES[0], label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()


def _counts(run: Run, name: str) -> numpy.ndarray:
    return numpy.sum([block["histograms"][name] for block in run.prune["blocks"]], axis=0)


def _short(name: str, block: dict) -> str:
    """A linear map's name inside its block; the experts of one weight share a name."""
    inside = name.removeprefix(block["name"] + ".")
    return re.sub(r"\.\d+$", "", re.sub(r"experts\.\d+\.", "experts.", inside))


def _number(value: float | None) -> float:
    return numpy.nan if value is None else value
