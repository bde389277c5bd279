"""`wandapp report`: what it reads, what the page shows, and how a real browser sees it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import wandapp
from wandapp import cli, html_report
from wandapp.config import PruneConfig
from wandapp.console import Output
from wandapp.errors import WandappError
from wandapp.html_report import write_report
from wandapp.runs import read_runs

EVALUATION = {"text": "pydoc", "seq_len": 32, "windows": 4}


@pytest.fixture(scope="module")
def place(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A folder with a dense model, three pruned ones, what eval said of them, and a packed one."""
    folder = tmp_path_factory.mktemp("runs")
    wandapp.save_pruned(tiny_model("llama")[0], tiny_tokenizer(), folder / "tiny", files={})
    made = {"few": {"samples": 2}, "more": {"samples": 4}, "refined": {"samples": 4, "method": "wanda++"}}
    for name, options in made.items():
        common = {"calibration": "pydoc", "seq_len": 32, "ro_rounds": 1, "ro_samples": 2, "skip": ("k_proj",)}
        recipe = PruneConfig(model=str(folder / "tiny"), out=str(folder / name), **common, **options)
        cli.run_recipe(recipe, Output(json_only=True))
    report = json.loads((folder / "more/wandapp/report.json").read_text())
    report["warnings"] = ["model.layers.0: <b>look</b> out"]
    (folder / "more/wandapp/report.json").write_text(json.dumps(report))
    for name in ("tiny", *made):
        figures = wandapp.perplexity(*wandapp.load_model(folder / name), **EVALUATION).to_dict()
        (folder / f"{name}.json").write_text("loading\n" + json.dumps({"model": str(folder / name), **figures}) + "\n")
    wandapp.pack_checkpoint(folder / "more", folder / "packed")
    rates = {form: {"tokens_per_s_batch_1": rate} for form, rate in (("dense", 10.0), ("sparse", 17.0))}
    (folder / "bench.json").write_text(json.dumps({"model": str(folder / "packed"), "rows": rates}))
    return folder


def test_command_says_what_it_wrote(place, tmp_path, monkeypatch, capfd):
    arguments = [str(place / "more"), "--out", str(tmp_path / "deep" / "r.html"), "--json"]
    monkeypatch.setattr("sys.argv", ["wandapp", "report", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    text, errors = capfd.readouterr()
    assert not caught.value.code, errors
    said = json.loads(text)
    assert (said["runs"], said["warnings"]) == (["more"], 1) and Path(said["out"]).stat().st_size == said["bytes"]


def places(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names]


@pytest.fixture(scope="module")
def everything(place) -> Path:
    """The page about all of it."""
    names = ("few", "more", "refined", "packed", *(path.name for path in place.glob("*.json")))
    write_report(read_runs(places(place, *names)), place / "report.html")
    return place / "report.html"


def rows(page: str) -> dict[str, list[str]]:
    """Cells of the table of runs, by run."""
    table = page[page.index('<table id="runs">') : page.index("</table>")]
    lines = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S) for row in table.split("<tr")[2:]]
    return {cells[0]: cells for cells in ([re.sub(r"<.*?>", "", cell).strip() for cell in line] for line in lines)}


def test_headline_states_quality_size_cost_and_speed_of_every_run(everything, place):
    found = rows(everything.read_text())
    assert list(found) == ["tiny", "few", "more", "refined", "packed"]
    dense, few = (
        json.loads((place / f"{name}.json").read_text().splitlines()[1])["perplexity"] for name in ("tiny", "few")
    )
    report = json.loads((place / "few/wandapp/report.json").read_text())
    assert found["tiny"][1:4] == ["dense", "–", f"{dense:,.2f}"]
    method, pattern, perplexity, zeros, size, seconds, peak, speed = found["few"][1:]
    assert (method, pattern, zeros, speed) == ("wanda", "2:4", "50.00", "–")
    assert perplexity == f"{few:,.2f}×{few / dense:.2f}"
    assert float(seconds) == pytest.approx(report["seconds"], abs=0.06) and peak == f"{report['peak_gib']:.2f}"
    stored = sum(path.stat().st_size for path in (place / "few").glob("*.safetensors"))
    assert size == f"{stored / 2**20:.1f}" != "0.0"
    assert found["packed"][1] == "wanda + packed" and found["packed"][-1] == "17.0"
    assert float(found["packed"][5]) < float(found["more"][5])


def test_page_needs_no_network_and_holds_no_script(everything):
    page = everything.read_text()
    assert "<script" not in page and "@import" not in page and "url(http" not in page
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="(.*?)"', page))
    assert page.count("<svg") == page.count("</svg>") >= 8
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_page_shows_every_warning_and_every_linear_map(everything):
    page = everything.read_text()
    assert "&lt;b&gt;look&lt;/b&gt; out" in page and "<b>look</b>" not in page
    assert page.count("model.layers.2.mlp.down_proj</td>") == 4  # few, more, refined, packed
    assert "Kept dense: " in page and "model.layers.0.self_attn.k_proj" in page


def test_plots_take_their_colours_from_the_page(everything):
    drawn = "".join(re.findall(r"<svg.*?</svg>", everything.read_text(), re.S))
    assert "var(--ink)" in drawn and "var(--s1)" in drawn and "#1c2526" not in drawn


def test_a_run_has_the_table_s_colour_in_the_plot_of_errors(place):
    page = html_report.Page(read_runs(places(place, "packed", "few")), [], None)  # packed: the first colour
    html_report._errors(page)
    drawn = page.sections[0]["figures"][0]["svg"]
    assert "var(--s2)" in drawn and "var(--s1)" not in drawn


def test_sparsity_is_drawn_by_block_where_it_differs(place):
    runs = read_runs(places(place, "few", "more"))
    runs[1].prune["allocation"] = {block["name"]: 0.5 for block in runs[1].prune["blocks"]}
    page = html_report.Page(runs, [], None)
    html_report._sparsity(page)
    drawn = page.sections[0]["figures"][0]["svg"]
    assert "zeros, %" in drawn and "more" in drawn and "few" not in drawn


@pytest.mark.parametrize(
    ("names", "shown"),
    [(("few", "more"), True), (("few", "refined"), False), (("few",), False), (("more", "packed"), False)],
)
def test_sensitivity_appears_where_runs_differ_in_samples_alone(names, shown, place):
    page = html_report.Page(read_runs(places(place, *names)), [], None)
    html_report._samples(page)
    assert [section["title"] for section in page.sections] == ["Sensitivity to calibration"] * shown


@pytest.mark.slow
def test_plots_folder_gets_every_plot_as_png_and_svg(place, tmp_path):
    said = write_report(read_runs(places(place, "few")), tmp_path / "report.html", tmp_path / "plots")
    stems = {"block-errors", "layer-errors-few", "seconds", "flop-rate", "weights-few", "scores-few"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{s}.{e}" for s in stems for e in ("png", "svg")}
    assert len(said["plots"]) == 2 * len(stems)


def test_perplexities_on_other_windows_stand_in_a_column_of_their_own(place, tmp_path):
    figures = json.loads((place / "few.json").read_text().splitlines()[1])
    (tmp_path / "other.json").write_text(json.dumps(figures | {"windows": 3, "perplexity": 77.0}))
    write_report(read_runs([place / "few", place / "few.json", tmp_path / "other.json"]), tmp_path / "report.html")
    cells = rows((tmp_path / "report.html").read_text())["few"]
    assert cells[3:5] == [f"{figures['perplexity']:,.2f}", "77.00"]


def test_results_of_a_sweep_are_runs_failures_included(place, tmp_path):
    shutil.copytree(place / "few", tmp_path / "few-12ab")
    report = json.loads((place / "few/wandapp/report.json").read_text())
    figures = json.loads((place / "few.json").read_text().splitlines()[1])
    del report["blocks"]
    recipe = {"model": str(place / "tiny"), "method": "wanda", "sparsity": "2:4"}
    lines = [
        {"name": "dense-tiny", "kind": "dense", "evaluation": figures, "status": "done"},
        {"name": "few-12ab", "kind": "prune", "report": report, "evaluation": figures, "status": "done"},
        {"name": "gone-34cd", "kind": "prune", "report": report, "evaluation": figures, "status": "done"},
        {"name": "bad-56ef", "kind": "prune", "status": "failed", "error": "no room"},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line | {"recipe": recipe}) + "\n" for line in lines))
    write_report(read_runs([tmp_path / "results.jsonl"]), tmp_path / "report.html")
    found = rows((tmp_path / "report.html").read_text())
    assert list(found) == ["tiny", "few-12ab", "gone-34cd", "bad-56ef"]
    assert found["tiny"][1] == "dense" and found["tiny"][3] == found["gone-34cd"][3].partition("×")[0]
    assert found["few-12ab"][5] != "–" and found["gone-34cd"][5] == "–"
    assert "failed: no room" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_recovered_run_shows_its_losses(place, tmp_path):
    shutil.copytree(place / "few", tmp_path / "trained")
    home = tmp_path / "trained/wandapp"
    (home / "recover.json").write_text(json.dumps({"pattern": "2:4", "checkpoint": "few"}))
    (home / "recover-loss.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 5 - i / 9}) + "\n" for i in range(20))
    )
    said = write_report(read_runs([tmp_path / "trained"]), tmp_path / "report.html")
    assert "Recovery" in said["sections"] and "wanda + recover" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nope.json", None, "neither a folder nor a JSON file"),
        ("words.json", "no json here", "words.json: no JSON"),
        ("list.json", "[1, 2]", "a JSON object was expected, got list"),
        ("other.json", '{"colour": "red"}', "no result of wandapp's prune, recover, eval or bench"),
        ("odd.json", '{"model": "x", "colour": "red"}', "no result of wandapp's prune, recover, eval or bench"),
        ("empty", "", "no wandapp/report.json in it"),
    ],
)
def test_what_is_no_result_is_refused_by_name(name, content, said, tmp_path):
    if name == "empty":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(WandappError, match=re.escape(said)):
        read_runs([tmp_path / name])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; apt-get install chromium")
@pytest.mark.parametrize(("scheme", "setting"), [("light", 1), ("dark", 0)])
def test_a_browser_shows_the_page_without_a_complaint(scheme, setting, everything, tmp_path):
    from PIL import Image, ImageStat

    common = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    common += [
        f"--user-data-dir={tmp_path}",
        f"--blink-settings=preferredColorScheme={setting}",
        "--window-size=1200,3000",
    ]
    picture, address = tmp_path / "page.png", everything.as_uri()
    for mode in (f"--screenshot={picture}", "--dump-dom"):
        run = subprocess.run([*common, mode, address], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        assert "CONSOLE" not in run.stderr, run.stderr
    seen = run.stdout  # the document after the browser's own parser
    assert seen.count("<table") >= 5 and 'id="runs"' in seen and seen.count("<svg") >= 8
    image = Image.open(picture).convert("L")
    brightness, spread = ImageStat.Stat(image).mean[0], ImageStat.Stat(image).stddev[0]
    assert spread > 10, "blank"
    assert (brightness > 200) if scheme == "light" else (brightness < 60)
    for top in range(0, 3000, 500):
        assert ImageStat.Stat(image.crop((0, top, 1200, top + 500))).stddev[0] > 3, f"blank from {top} on"
