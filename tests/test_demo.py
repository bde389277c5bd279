"""`wandapp demo`, the first command that many people run, with a tiny model in the place of SmolLM2."""

import json
import sys

import pytest

from wandapp import demo
from wandapp.models import LoadedModel

SMALL = {"calibration": "pydoc", "samples": 2, "seq_len": 32}


@pytest.fixture
def small(tiny_model, tiny_tokenizer, monkeypatch):
    loaded = LoadedModel(tiny_model("llama")[0], tiny_tokenizer(), "smollm2")
    monkeypatch.setattr(demo, "load_model", lambda reference: loaded)
    refined = SMALL | {"ro_rounds": 1, "ro_samples": 1}
    monkeypatch.setattr(demo, "CONTENDERS", {"magnitude": SMALL, "wanda++": refined})
    monkeypatch.setattr(demo, "EVALUATION", {"text": "pydoc", "seq_len": 32, "windows": 2})
    monkeypatch.setattr(demo, "NEW_TOKENS", 2)


def run(monkeypatch, capfd, *arguments) -> tuple[int, str, str]:
    from wandapp import cli

    monkeypatch.setattr(sys, "argv", ["wandapp", "demo", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capfd.readouterr()


def test_demo_compares_verifies_saves_packs_and_writes(small, tmp_path, monkeypatch, capfd):
    code, text, said = run(monkeypatch, capfd, "--out", tmp_path / "out", "--json")
    assert code == 0, said
    figures = json.loads(text)
    assert [row["model"] for row in figures["rows"]] == ["dense", "magnitude 2:4", "wanda++ 2:4"]
    assert figures["verified_linears"] == 21 and all(row["perplexity"] > 1 for row in figures["rows"])
    assert (tmp_path / "out" / "config.json").is_file() and (tmp_path / "out-packed" / "wandapp/packed.json").is_file()
    lines = [line for line in said.splitlines() if " writes: " in line]
    assert (
        len(lines) == 3 and len({line.partition(" writes: ")[2] for line in lines[1:]}) == 1
    )  # dense with zeros = packed


def test_a_folder_that_wandapp_did_not_write_is_left_alone(small, tmp_path, monkeypatch, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, _, said = run(monkeypatch, capfd, "--out", tmp_path / "out")
    assert code == 2 and "replaces only folders that wandapp wrote" in said
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
