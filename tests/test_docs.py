"""The documentation: it builds without a warning, and what it tells people to type works.

A fenced block that a reader would run carries one comment on the line above it (renderers show none of it):

    <!-- runs: tiny -->         executed here, in the order of the page, in a folder of its own; `smollm2` is a tiny random
                                model there, and samples, lengths and windows are small
    <!-- needs: gpu ... -->     not executed: what it needs that a test machine has not (gpu, network, time, ...)

bash blocks without a comment fail, and so do python blocks that are no excerpt of a file (`--8<--`) or of the interfaces.
"""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from wandapp import save_pruned

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^(?:<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
TINY = {  # what a tiny model gets instead
    r"\bsmollm2\b": "tiny",
    r"(--samples |samples=)\d+": r"\g<1>4",
    r"(--seq-len |seq_len=)\d+": r"\g<1>32",
    r"^(wandapp eval \S+)": r"\g<1> --windows 2",
    r"(--windows |windows=)\d+": r"\g<1>2",
    r"(perplexity\(.*seq_len=\d+)\)": r"\g<1>, windows=2)",
    r"(--held-out )\d+": r"\g<1>1",
    r"(--(?:max-new|new|prompt)-tokens )\d+": r"\g<1>4",
}


class Block(NamedTuple):
    note: str
    language: str
    text: str

    @property
    def is_command(self) -> bool:
        starts = ("wandapp ", "make ", "pip ", "python ", "torchrun ")
        return self.language in ("bash", "sh", "console") or (not self.language and self.text.startswith(starts))

    @property
    def is_executable(self) -> bool:
        if "--8<--" in self.text:  # an excerpt of a file that a test runs
            return False
        return self.is_command or (
            self.language == "python" and re.search(r"\bimport wandapp|\bfrom wandapp", self.text)
        )

    @property
    def tiny(self) -> str:
        text = self.text
        for pattern, small in TINY.items():
            text = re.sub(pattern, small, text, flags=re.M)
        return text


def blocks(page: Path) -> list[Block]:
    return [Block(note or "", *rest) for note, *rest in FENCE.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_executed_or_says_what_it_needs(page):
    bare = [
        block.text
        for block in blocks(page)
        if block.is_executable and not re.match(r"runs: tiny$|needs: \w+", block.note)
    ]
    assert not bare, f"write <!-- runs: tiny --> or <!-- needs: gpu --> (network, time, ...) above:\n{bare[0]}"


def test_included_files_are_there():
    included = {name for page in PAGES for name in re.findall(r'--8.*"(.*?)"', page.read_text())}
    assert included and all((ROOT / name).is_file() for name in included)
    assert all(f'--8<-- "{name}"' in "".join(page.read_text() for page in PAGES) for name in included)


def test_the_page_of_commands_has_them_all():
    from wandapp import cli, cli_habits

    page = (ROOT / "docs/commands.md").read_text()
    missing = [path for path, _ in cli_habits.commands(cli_habits.complete(cli.app)) if f"wandapp {path} " not in page]
    assert missing in ([], ["doctor", "demo"])  # which take no arguments there
    assert "wandapp doctor\n" in page and "wandapp demo\n" in page


def executed(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.note == "runs: tiny"]


@pytest.fixture
def session(tiny_model, tiny_tokenizer, tmp_path, monkeypatch) -> Path:
    """The folder that a page's commands run in."""
    save_pruned(tiny_model("llama")[0], tiny_tokenizer(), tmp_path / "tiny", files={})
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if executed(page)], ids=lambda page: page.name)
def test_commands_of_a_page_work(page, session, monkeypatch, capfd):
    names: dict[str, object] = {"__name__": "page"}
    for block in executed(page):
        if block.language == "python":
            exec(compile(block.tiny, page.name, "exec"), names)
            continue
        for line in block.tiny.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                code, errors = run(words, monkeypatch, capfd)
                assert code == 0, f"{line}\n{errors}"


def run(words: list[str], monkeypatch, capfd) -> tuple[int, str]:
    """(exit code, stderr) of a command; wandapp's own in this process, which spares an import of torch each."""
    if words[0] != "wandapp":
        words = [sys.executable if words[0] == "python" else words[0], *words[1:]]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr
    from wandapp import cli

    target = words[words.index(">") + 1] if ">" in words else None
    monkeypatch.setattr(sys, "argv", words[: words.index(">")] if target else words)
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    text, errors = capfd.readouterr()
    if target:
        Path(target).write_text(text)
    return caught.value.code or 0, errors


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed; make docs installs it")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    pages = {path.stem for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.stem for path in tmp_path.rglob("*.html")}
    assert "RelativeImportance" in (tmp_path / "new-method.html").read_text()  # the included file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("bulk_pruning.py", ["tiny", "out"], "sparsegpt-0.5"),
        ("inference_benchmark.py", ["pruned"], "tokens/s: dense"),
        ("kernel_research.py", ["64", "128"], "bit-equal"),
    ],
)
def test_examples_run(script, arguments, said, session, monkeypatch, capfd):
    if "pruned" in arguments:
        prune = "wandapp prune tiny --calibration pydoc --samples 2 --seq-len 32 --out pruned --quiet"
        assert run(prune.split(), monkeypatch, capfd)[0] == 0
    command = [sys.executable, ROOT / "examples" / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_worked_method_is_what_its_equation_says(tiny_model, tiny_tokenizer):
    """RIA by hand: (|W| / row sum + |W| / column sum) * sqrt(s), at the first linear map."""
    import importlib.util

    import torch

    import wandapp
    from wandapp.methods import METHODS

    spec = importlib.util.spec_from_file_location("new_method", ROOT / "examples" / "new_method.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    try:
        model, _ = tiny_model("llama")
        query = model.model.layers[0].self_attn.q_proj
        weight, seen = query.weight.detach().double().clone(), []
        tokens = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
        hook = query.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double()))
        model(tokens)
        hook.remove()
        norm = (seen[0].square().sum(dim=(0, 1)) / 2).sqrt()
        wandapp.prune(model, calibration=tokens, method="ria", sparsity="2:4")
    finally:
        METHODS.pop("ria", None)
    for row, pruned in zip(range(weight.shape[0]), query.weight, strict=True):
        score = weight[row].abs() * (1 / weight[row].abs().sum() + 1 / weight.abs().sum(dim=0)) * norm.sqrt()
        for start in range(0, weight.shape[1], 4):
            expected = set(score[start : start + 4].topk(2).indices.tolist())
            assert set(pruned[start : start + 4].nonzero().flatten().tolist()) == expected
