"""One HTML file about runs: tables by jinja2, plots by matplotlib, nothing fetched from anywhere and no script in it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandapp import __version__
from wandapp.errors import WandappError, shorten
from wandapp.runs import Run, short_text, text_key


@dataclass
class Page:
    """What the template shows. plots: file stem -> SVG document, in order of appearance."""

    runs: list[Run]
    texts: list[tuple]
    dense: Run | None
    sections: list[dict[str, Any]] = field(default_factory=list)
    plots: dict[str, Any] = field(default_factory=dict)


def write_report(runs: Sequence[Run], out: Path, plots: Path | None = None) -> dict[str, Any]:
    """Writes the HTML file `out`, and each plot as PNG and SVG into the folder `plots`; says what it wrote.

    raises  WandappError where a package is missing or a path cannot be written
    """
    try:
        page = _page(list(runs))
    except (LookupError, TypeError, AttributeError) as error:
        names = ", ".join(shorten(run.name) for run in runs[:8])
        raise WandappError(
            f"{names}: results that this wandapp cannot show ({type(error).__name__}: {shorten(error)}); leave out those that it "
            "did not write"
        ) from error
    written = []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_render(page), encoding="utf-8")
        for stem, figure in page.plots.items() if plots else ():
            plots.mkdir(parents=True, exist_ok=True)
            for suffix in ("svg", "png"):
                written.append(plots / f"{stem}.{suffix}")
                figure.savefig(written[-1], dpi=160, facecolor="white")
    except OSError as error:
        raise WandappError(f"{error.filename}: cannot be written ({error.strerror}); choose another place") from None
    return {
        "out": str(out),
        "bytes": out.stat().st_size,
        "runs": [run.name for run in runs],
        "sections": [section["title"] for section in page.sections],
        "plots": [str(path) for path in written],
        "warnings": sum(len(run.warnings) for run in runs),
    }


def _page(runs: list[Run]) -> Page:
    texts = list(dict.fromkeys(text_key(result) for run in runs for result in run.perplexities))
    page = Page(runs, texts, next((run for run in runs if run.is_dense), None))
    for section in (_across_runs, _samples, _sparsity, _errors, _cost, _distributions, _recovery):
        section(page)
    return page


def _plot(page: Page, stem: str, caption: str, draw: Callable[..., None], *arguments: Any, **options: Any) -> dict:
    """One figure of a section; its SVG goes into the page and its figure into `plots`."""
    from wandapp import plots

    figure = plots.draw(draw, *arguments, **options)
    page.plots[stem] = figure
    return {"svg": plots.themed_svg(plots.svg(figure), caption), "caption": caption}


def _section(page: Page, title: str, note: str, figures: list[dict]) -> None:
    if figures:
        page.sections.append({"title": title, "note": note, "figures": figures})


def _across_runs(page: Page) -> None:
    from wandapp import plots

    figures = []
    for index, text in enumerate(page.texts):
        for stem, label, value in (
            ("size", "MiB on disk", lambda run: run.stored_bytes and run.stored_bytes / 2**20),
            ("speed", "tokens/s", lambda run: run.tokens_per_s),
        ):
            known = [(run, c) for run, c in plots.coloured(page.runs) if value(run) and run.perplexity(text)]
            if len(known) > 1:
                points = [(run.name, colour, value(run), run.perplexity(text)) for run, colour in known]
                name = short_text(text)
                caption = f"Perplexity on {name} against {label}: down is better"
                figures.append(_plot(page, f"perplexity-{stem}-{index}", caption, plots.tradeoff, points, label, name))
    _section(page, "Quality against size and speed", "", figures)


def _samples(page: Page) -> None:
    """Where runs differ in nothing but the number of samples."""
    from wandapp import plots

    groups: dict[str, list[Run]] = {}
    for run in page.runs:
        if run.prune and not run.is_packed and not run.recover:
            ignored = ("samples", "out", "overwrite", "save_calibration", "batch_size", "device")
            rest = {key: value for key, value in run.recipe.items() if key not in ignored}
            groups.setdefault(repr(sorted(rest.items())) if rest else run.method, []).append(run)
    series = [group for group in groups.values() if len({run.prune["samples"] for run in group}) > 1]
    figures = []
    for index, text in enumerate(page.texts):
        lines = _lines(series, lambda run: run.perplexity(text))  # noqa: B023
        if lines:
            label = f"perplexity, {short_text(text)}"
            figures.append(_plot(page, f"samples-perplexity-{index}", label, plots.sensitivity, lines, label))
    lines = _lines(series, _mean_error)
    if lines:
        label = "mean relative block error"
        figures.append(_plot(page, "samples-error", label, plots.sensitivity, lines, label))
    _section(
        page, "Sensitivity to calibration", "Runs that differ in the number of calibration samples alone.", figures
    )


def _lines(series: list[list[Run]], value: Callable[[Run], float | None]) -> list[tuple]:
    from wandapp import plots

    lines = []
    for index, group in enumerate(series):
        points = sorted((run.prune["samples"], value(run)) for run in group if run.prune and value(run) is not None)
        if len({samples for samples, _ in points}) > 1:
            name = f"{group[0].method} {group[0].pattern}"
            lines.append((name, plots.SERIES[index % len(plots.SERIES)], points))
    return lines


def _mean_error(run: Run) -> float | None:
    errors = [block["error"] for block in run.prune["blocks"] if block["error"] is not None] if run.prune else []
    return sum(errors) / len(errors) if errors else None


def _sparsity(page: Page) -> None:
    """Where blocks were given unequal sparsities; elsewhere it is the headline's."""
    from wandapp import plots

    uneven = [run for run in _pruned(page) if run.prune.get("allocation")]
    if uneven:
        figure = _plot(page, "block-sparsity", "Zeros of each block", plots.block_sparsity, _with_colours(page, uneven))
        _section(page, "Sparsity by block", "As --allocate has spread it.", [figure])


def _errors(page: Page) -> None:
    from wandapp import plots

    pruned = _pruned(page)
    if not pruned:
        return
    caption = "Error of each block's outputs on calibration samples; dotted: before the refiner"
    figures = [_plot(page, "block-errors", caption, plots.block_errors, _with_colours(page, pruned))]
    errors = [e for run in pruned for block in run.prune["blocks"] for e in block["layer_errors"].values()]
    highest = max([error for error in errors if error is not None], default=1.0)
    for run in pruned if errors else ():
        caption = f"{run.name}: error of every linear map"
        figures.append(_plot(page, f"layer-errors-{_stem(run)}", caption, plots.layer_errors, run, highest))
    _section(page, "Reconstruction error", "Relative to the dense block on the pruned path's inputs.", figures)


def _cost(page: Page) -> None:
    from wandapp import plots

    pruned, figures = _pruned(page), []
    size = (5.6, 1.2 + 0.42 * len(pruned))
    if any(run.prune.get("seconds_by_phase") for run in pruned):
        figures.append(_plot(page, "seconds", "Where the time went", plots.seconds_by_phase, pruned, size=size))
    if any(run.prune.get("matmul_gflops") for run in pruned):
        caption = "FLOP rate, and what a plain matrix product reached on the same machine during the run"
        figures.append(_plot(page, "flop-rate", caption, plots.rates, pruned, size=size))
    _section(page, "Cost", "Wall time of recording and pruning; loading the model is left out.", figures)


def _distributions(page: Page) -> None:
    from wandapp import plots

    figures = []
    for run in _pruned(page):
        if all(block.get("histograms") for block in run.prune["blocks"]):
            for kind, draw in (("weights", plots.weight_histogram), ("scores", plots.score_histogram)):
                caption = f"{run.name}: {kind}"
                figures.append(_plot(page, f"{kind}-{_stem(run)}", caption, draw, run, size=(5.6, 2.6)))
    note = "From a few evenly spaced rows of every linear map, all blocks together; each map in its own units."
    _section(page, "Weights and scores, before and after", note, figures)


def _recovery(page: Page) -> None:
    from wandapp import plots

    figures = [
        _plot(page, f"loss-{_stem(run)}", f"{run.name}: loss of recovery training", plots.losses, run)
        for run in page.runs
        if run.losses
    ]
    _section(page, "Recovery", "Training with the zeros kept.", figures)


def _pruned(page: Page) -> list[Run]:
    """Runs that pruned something themselves: a packed or trained copy has the report of the run it was made from."""
    runs = [run for run in page.runs if run.prune and run.prune.get("blocks")]
    own = [run for run in runs if not run.is_packed and not run.recover]
    return own or runs


def _with_colours(page: Page, runs: list[Run]) -> list[tuple[Run, str]]:
    """Those runs, in the colours that they have in every plot and in the table."""
    from wandapp import plots

    return [(run, colour) for run, colour in plots.coloured(page.runs) if run in runs]


def _stem(run: Run) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", run.name).strip("-.") or "run"


def _render(page: Page) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise WandappError("report needs jinja2, which is not installed; run: pip install jinja2") from None
    environment = Environment(
        loader=PackageLoader("wandapp", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": _figure,
        "short_text": short_text,
        "mib": lambda size: _figure(size and size / 2**20, 1),
    }
    return environment.get_template("report.html.j2").render(page=page, version=__version__)


def _figure(value: float | None, digits: int = 2) -> str:
    """A number for a table cell; a dash where it is not known."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}" if abs(value) >= 10.0**-digits or value == 0 else f"{value:.{digits}g}"
