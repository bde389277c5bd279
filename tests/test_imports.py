"""The import floors of CONTRIBUTING.md, read from the source: an arrow only goes down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# module -> floor; a package stands for everything in it. The first match counts.
FLOORS = {
    "wandapp._C": 0,
    "wandapp.errors": 0,  # any floor may raise
    "wandapp.kernels": 1,
    "wandapp.memory": 2,
    "wandapp.stop": 2,
    "wandapp.small_file": 2,
    "wandapp.yaml_file": 2,
    "wandapp.pattern": 2,
    "wandapp.options": 2,
    "wandapp.recover_config": 2,
    "wandapp.config": 2,
    "wandapp.hub": 3,
    "wandapp.weight_files": 3,
    "wandapp.output": 3,
    "wandapp.devices": 3,
    "wandapp.locate": 3,
    "wandapp.quiet": 3,
    "wandapp.tokenizer": 3,
    "wandapp.skeleton": 3,
    "wandapp.models": 3,
    "wandapp.conversion": 3,
    "wandapp.corpus": 3,
    "wandapp.calibration": 3,
    "wandapp.blocks": 3,
    "wandapp.distributed": 3,
    "wandapp.descent": 3,
    "wandapp.statistics": 3,
    "wandapp.histograms": 3,
    "wandapp.skipping": 3,
    "wandapp.channel_order": 3,
    "wandapp.folding": 3,
    "wandapp.permutation": 3,
    "wandapp.shards": 3,
    "wandapp.checkpoint": 3,
    "wandapp.manifest": 3,
    "wandapp.gguf_source": 3,
    "wandapp.methods": 4,
    "wandapp.run_folder": 4,
    "wandapp.shard_store": 4,
    "wandapp.store": 4,
    "wandapp.packed": 4,
    "wandapp.packing": 4,
    "wandapp.routing": 4,
    "wandapp.modules": 4,
    "wandapp.saving": 4,
    "wandapp.export": 4,
    "wandapp.inference": 4,
    "wandapp.masked": 4,
    "wandapp.training": 4,
    "wandapp.card": 4,
    "wandapp.verify": 5,
    "wandapp.track": 5,
    "wandapp.recovery": 5,
    "wandapp.inspection": 5,
    "wandapp.tasks": 5,
    "wandapp.evaluation": 5,
    "wandapp.report": 5,
    "wandapp.evaluate": 5,
    "wandapp.allocation": 5,
    "wandapp.tuning": 5,
    "wandapp.pipeline": 5,
    "wandapp.job": 5,
    "wandapp.plan": 5,
    "wandapp": 6,  # cli, console, demo, doctor and the lazy public names
}
STANDARD = sys.stdlib_module_names
ALLOWED_OUTSIDE = {1: {"torch", "triton", "numpy"}, 2: {"pydantic", "yaml"}}


def sources() -> dict[str, Path]:
    """Dotted module name -> file."""
    files = {}
    for path in sorted((ROOT / "wandapp").rglob("*.py")):
        files[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        files["wandapp." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return files


SOURCES = sources()


def floor(module: str) -> int:
    return next(level for name, level in FLOORS.items() if module == name or module.startswith(name + "."))


def imports(path: Path) -> set[str]:
    """Dotted names a file imports, wherever in it; what only type checkers see does not count."""
    found = set()
    unseen = [ast.parse(path.read_text(encoding="utf-8"))]
    while unseen:
        node = unseen.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES or name == "wandapp._C" else node.module for name in names}
        unseen += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("module", [module for module in SOURCES if floor(module) < 6])
def test_module_imports_only_from_its_floor_or_below(module):
    ours = {name for name in imports(SOURCES[module]) if name.split(".")[0] == "wandapp"}
    too_high = {name: floor(name) for name in ours if name != "wandapp" and floor(name) > floor(module)}
    assert not too_high, f"{module} stands on floor {floor(module)} and imports {too_high}"


@pytest.mark.parametrize("module", SOURCES)
def test_transformers_is_imported_in_few_named_files(module):
    """models loads and saves, skeleton builds without weights, tokenizer reads text, all through quiet; conversion knows
    how a checkpoint's tensors become parameters, checkpoint and gguf_source apply that to one block at a time."""
    uses = any(name.split(".")[0] == "transformers" for name in imports(SOURCES[module]))
    few = {"models", "skeleton", "tokenizer", "quiet", "conversion", "checkpoint", "gguf_source"}
    assert uses == (module.removeprefix("wandapp.") in few)


@pytest.mark.parametrize("module", [module for module in SOURCES if floor(module) in ALLOWED_OUTSIDE])
def test_lower_floors_know_few_packages(module):
    outside = {name.split(".")[0] for name in imports(SOURCES[module])} - STANDARD - {"wandapp"}
    assert outside <= ALLOWED_OUTSIDE[floor(module)]


@pytest.mark.parametrize("module", [module for module in SOURCES if module.startswith("wandapp.methods")])
def test_methods_know_neither_store_nor_pipeline(module):
    assert not imports(SOURCES[module]) & {"wandapp.store", "wandapp.pipeline"}


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['wandapp', '--version']; import wandapp.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names_exist():
    import wandapp

    for name in wandapp.__all__:
        assert getattr(wandapp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        _ = wandapp.prnue


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_root_folder_kernels_does_not_shadow_the_package_that_transformers_probes(tmp_path):
    """From the root of the repository, with a distribution `kernels` installed, transformers finds that one."""
    stub = tmp_path / "kernels"
    (stub / "layer").mkdir(parents=True)
    (stub / "__init__.py").write_text("def __getattr__(name):\n    return type(name, (), {})\n")
    (stub / "layer" / "__init__.py").touch()
    (stub / "layer" / "mode.py").write_text("class Mode: ...\n")
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
from transformers.utils.import_utils import KERNELS_MIN_VERSION, is_kernels_available
info = {str(tmp_path)!r} + "/kernels-" + KERNELS_MIN_VERSION + ".dist-info"
import os; os.mkdir(info)
open(info + "/METADATA", "w").write("Metadata-Version: 2.1\\nName: kernels\\nVersion: " + KERNELS_MIN_VERSION + "\\n")
is_kernels_available.cache_clear()
assert is_kernels_available(), "the stub distribution is not seen"
import kernels
assert kernels.__file__.startswith({str(tmp_path)!r}), kernels
from transformers import LlamaForCausalLM
"""
    environment = {"USE_HUB_KERNELS": "NO", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
