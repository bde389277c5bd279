"""Bad input gets one sentence on stderr, exit code 2, no traceback and no output folder."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wandapp import save_pruned


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad-input") / "tiny-llama"
    save_pruned(tiny_model("llama")[0], tiny_tokenizer(), folder, files={})
    return folder


@pytest.fixture
def place(checkpoint, tmp_path, monkeypatch) -> Path:
    """A folder with one of everything that can be wrong; the current directory."""
    (tmp_path / "tiny").symlink_to(checkpoint)
    (tmp_path / "short.txt").write_text("Too short a text.")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text('{"body": "text"}\n')
    (tmp_path / "recipe.yaml").write_text("spasity: 2:4\n")
    (tmp_path / "list.yaml").write_text("- wanda\n")
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    corrupt = tmp_path / "corrupt"
    corrupt.mkdir()
    (corrupt / "config.json").write_text((checkpoint / "config.json").read_text())
    (corrupt / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:1000])
    save_file({"tokens": torch.full((4, 32), 10**6)}, tmp_path / "foreign.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


PYDOC = "--calibration pydoc --samples 2 --seq-len 16"
CASES = {
    "missing folder": (f"prune ./nope --out out {PYDOC}", "./nope: no such folder"),
    "missing hub model": (f"prune nobody/nothing --out out {PYDOC}", "nobody/nothing: neither a local folder nor"),
    "missing gguf": (f"prune nope.gguf --out out {PYDOC}", "nope.gguf: the model cannot be read"),
    "corrupt safetensors": (f"prune corrupt --out out {PYDOC}", "model.safetensors: corrupt or incomplete"),
    "a file as model": (f"prune file --out out {PYDOC}", "file: not a model"),
    "no model": (f"prune --out out {PYDOC}", "prune needs model"),
    "no output": (f"prune tiny {PYDOC}", "prune needs out"),
    "wrong dtype": (f"prune tiny --dtype float64 --out out {PYDOC}", "dtype: must be"),
    "wrong device": (f"prune tiny --device tpu --out out {PYDOC}", "device: must be"),
    "absent gpu": (f"prune tiny --device cuda:99 --out out {PYDOC}", "device cuda:99 is not here"),
    "sparsity 1.5": (f"prune tiny --sparsity 1.5 --out out {PYDOC}", "above 0 and below 1, got 1.5"),
    "sparsity 3:2": (f"prune tiny --sparsity 3:2 --out out {PYDOC}", "0 < n < m, got 3:2"),
    "sparsity abc": (f"prune tiny --sparsity abc --out out {PYDOC}", "neither n:m nor a number"),
    "indivisible": (f"prune tiny --sparsity 3:7 --out out {PYDOC}", "needs in_features divisible by 7, got 64"),
    "unknown method": (f"prune tiny --method wnda --out out {PYDOC}", "did you mean 'wanda'?"),
    "unknown refiner": (f"prune tiny --method wanda+r --out out {PYDOC}", "refiner 'r' does not exist"),
    "useless skip": (f"prune tiny --skip nothing_like_it --out out {PYDOC}", "nothing_like_it"),
    "bad skip": (f"prune tiny --skip ( --out out {PYDOC}", "no regular expression"),
    "no samples": ("prune tiny --samples 0 --out out", "samples: must be greater than or equal to 1, got '0'"),
    "too short text": ("prune tiny --calibration short.txt --samples 4 --seq-len 32 --out out", "128 needed"),
    "empty text": ("prune tiny --calibration empty.jsonl --out out", "empty.jsonl"),
    "wrong field": ("prune tiny --calibration other.jsonl --out out", "--text-field"),
    "missing text": ("prune tiny --calibration nope.txt --out out", "nope.txt: no such file"),
    "unknown source": ("prune tiny --calibration pydok --out out", "did you mean 'pydoc'?"),
    "foreign tokens": ("prune tiny --calibration foreign.safetensors --out out", "token id 1000000"),
    "unknown key": (f"prune tiny --config recipe.yaml --out out {PYDOC}", "did you mean 'sparsity'?"),
    "recipe of another shape": ("prune tiny --config list.yaml --out out", "list.yaml: a recipe is"),
    "missing recipe": ("prune tiny --config nope.yaml --out out", "nope.yaml: the recipe cannot be read"),
    "existing output": (f"prune tiny --out thesis {PYDOC}", "thesis: the output folder exists already"),
    "foreign output": (f"prune tiny --out thesis --overwrite {PYDOC}", "only folders that wandapp wrote"),
    "unwritable output": (f"prune tiny --out file/out {PYDOC}", "file/out: the output folder cannot be made"),
    "unknown flag": (f"prune tiny --spasity 2:4 --out out {PYDOC}", "No such option: --spasity"),
    "eval of nothing": ("eval ./nope --text pydoc", "./nope: no such folder"),
    "eval on short text": ("eval tiny --text short.txt --seq-len 64", "short.txt"),
    "private without a hub": (
        f"prune tiny --private --out out {PYDOC}",
        "--private is of the repository of --push-to-hub",
    ),
    "LoRA beside full": ("recover tiny --out out --full --rank 4", "rank: is an option of LoRA"),
    "a nearly right model": (f"prune tyni --out out {PYDOC}", "did you mean tiny?"),
    "a plot in no folder": ("bench inference tiny --plot gone/a.png", "gone/a.png: cannot be written"),
    "a plot of no kind": ("bench inference tiny --plot a.gif", "a plot is written as .png"),
    "figures kept nowhere": ("eval tiny --save --text pydoc", "--save keeps figures beside a checkpoint"),
    "verify without recipe": ("verify tiny", "no wandapp/recipe.yaml says what was pruned"),
    "verify of nothing": ("verify tyni", "tyni: no such folder; did you mean tiny?"),
    "verify a bad skip": ("verify tiny --sparsity 2:4 --skip [", "'[' is no regular expression"),
    "verify a bad pattern": ("verify tiny --sparsity 4:2", "0 < n < m, got 4:2"),
    "generate from nothing": ("generate ./nope hello", "./nope: no such folder"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_sentence_and_no_output(case, place, monkeypatch, capfd):
    from wandapp import cli

    command, said = CASES[case]
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["wandapp", *command.split()])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    text, errors = capfd.readouterr()
    assert caught.value.code == 2, errors
    assert said in errors.splitlines()[-1]
    assert "Traceback" not in errors and text == ""
    assert sorted(place.rglob("*")) == before
