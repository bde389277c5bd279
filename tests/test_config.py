"""PruneConfig: what is accepted, what is refused and how, and that a recipe file survives a round trip."""

import pytest

from wandapp import PruneConfig, WandappError
from wandapp.config import PRESETS
from wandapp.job import resolved as resolved_for
from wandapp.methods import unread


def test_defaults_are_those_of_the_papers():
    config = PruneConfig()
    assert (config.method, config.sparsity, config.calibration, config.seed) == ("wanda", "2:4", "c4", 0)
    assert (config.ro_rounds, config.ro_samples, config.damping, config.alpha) == (5, 32, 0.01, None)


def test_every_field_says_what_it_is():
    assert all(field.description for field in PruneConfig.model_fields.values())


def test_text_from_flags_becomes_numbers():
    config = PruneConfig(samples="16", alpha="100", ro_lr="1e-7", sparsity="50%", dtype="bf16", skip="down_proj")
    assert (config.samples, config.alpha, config.ro_lr) == (16, 100.0, 1e-7)
    assert (config.sparsity, config.dtype, config.skip) == ("0.5", "bfloat16", ("down_proj",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"spasity": "2:4"}, "option 'spasity' does not exist; did you mean 'sparsity'?"),
        ({"samples": 0}, "samples: must be greater than or equal to 1, got 0"),
        ({"samples": "many"}, "got 'many'"),
        ({"dtype": "float64"}, "got 'float64'"),
        ({"device": "tpu"}, "got 'tpu'"),
        ({"skip": "("}, "no regular expression"),
        ({"alpha": "big"}, "alpha: "),
        ({"alpha": float("nan")}, "alpha: "),
        ({"ro_lr": -1}, "ro_lr: must be greater than 0, got -1"),
        ({"sparsity": "3:2"}, "0 < n < m, got 3:2"),
        ({"magnitude_group": "column"}, "'row' or 'matrix', got 'column'"),
        ({"seed": -1}, "seed: "),
    ],
)
def test_bad_option_is_refused_in_one_sentence(options, said):
    with pytest.raises(WandappError) as caught:
        PruneConfig(**options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


def test_a_streamed_model_cannot_run_as_a_whole():
    assert PruneConfig(preset="best").resolved().self_samples == 64
    said = []
    streamed = resolved_for(PruneConfig(preset="best", stream=True).resolved(), True, said.append)
    assert (streamed.self_samples, streamed.tune_passes) == (0, 0)
    assert len(said) == 1 and "is streamed, so this run is without --self-samples 64" in said[0]
    for option in ("self_samples", "tune_passes"):
        with pytest.raises(
            WandappError, match=f"{option} 8: the whole model must be in memory for that; use --no-stream"
        ):
            PruneConfig(**{option: 8}, stream=True)


def test_config_cannot_be_changed_after_validation():
    with pytest.raises(ValueError, match="frozen"):
        PruneConfig().seed = 1


def test_recipe_round_trip(tmp_path):
    config = PruneConfig(model="smollm2", sparsity="2:4", skip=("down_proj", r"layers\.0\."), ro_lr=3e-7, alpha=50)
    config.to_yaml(tmp_path / "recipe.yaml")
    assert PruneConfig.from_yaml(tmp_path / "recipe.yaml") == config


def test_recipe_reads_patterns_and_numbers_as_people_write_them(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 2:4\nro_lr: 1e-7\nseed: 3\nskip: [a, b]\nout:\noverwrite: true\n")
    config = PruneConfig.from_yaml(recipe, seed=4)
    assert config.sparsity == "2:4"  # YAML 1.1 would say 124
    assert (config.ro_lr, config.skip, config.out, config.overwrite) == (1e-7, ("a", "b"), None, True)
    assert config.seed == 4  # a flag wins


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"samlpes: 3", "did you mean 'samples'?"),
        (b"- wanda", "got list"),
        (b"", "got nothing"),
        (b"a: [", "line 1: not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"model: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_bad_recipe_is_refused_in_one_sentence(tmp_path, content, said):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    with pytest.raises(WandappError) as caught:
        PruneConfig.from_yaml(recipe)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(WandappError, match=r"nope\.yaml: the recipe cannot be read \(No such file"):
        PruneConfig.from_yaml(tmp_path / "nope.yaml")


def test_preset_best_names_a_method_unless_one_was_given():
    assert PruneConfig(preset="best").resolved().method == "wanda+ro+reconstruct"
    assert PruneConfig(preset="best", method="wanda").resolved().method == "wanda"
    assert PruneConfig().resolved().method == "wanda"
    resolved = PruneConfig(preset="best").resolved()
    assert PruneConfig(**resolved.model_dump()).resolved() == resolved


@pytest.mark.parametrize(
    ("sparsity", "permute", "allocate"), [("2:4", True, "uniform"), ("0.5", False, "error"), ("16:32", True, "uniform")]
)
def test_preset_best_permutes_groups_and_allocates_fractions(sparsity, permute, allocate):
    resolved = PruneConfig(preset="best", sparsity=sparsity).resolved()
    assert (resolved.permute, resolved.allocate) == (permute, allocate)
    usual = PruneConfig(sparsity=sparsity).resolved()
    assert (usual.permute, usual.allocate) == (False, "uniform")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fills_in_every_open_method_option(preset):
    resolved = PruneConfig(preset=preset).resolved()
    assert all(getattr(resolved, name) is not None for values in PRESETS.values() for name in values)


def unread_of(**options):
    return unread(PruneConfig(**options).resolved(), options)


def test_options_that_a_run_does_not_read_are_known():
    assert unread_of(reconstruct_compute="auto", tune_passes=0) == {"reconstruct_compute": ("reconstruct", "tuning")}
    assert unread_of(reconstruct_compute="auto", reconstruct_lr=0.1, tune_passes=1) == {
        "reconstruct_lr": ("reconstruct",)
    }
    assert unread_of(alpha=2.0, damping=0.1) == {"alpha": ("rgs", "gblm"), "damping": ("sparsegpt", "admm")}
    assert unread_of(tune_lr=0.1, self_temperature=2.0).keys() == {"tune_lr", "self_temperature"}
    assert not unread_of(tune_lr=0.1, tune_passes=1, self_temperature=2.0, calibration="self")
    spread = dict(allocate_spread=0.1, owl_outlier=4.0)
    assert unread_of(**spread).keys() == spread.keys()
    assert unread_of(**spread, sparsity="0.6", allocate="error").keys() == {"owl_outlier"}
    assert not unread_of(**spread, sparsity="0.6", allocate="owl")


@pytest.mark.parametrize(
    "first, then",
    [
        (dict(sparsity="2:4"), dict(preset="paper")),
        (dict(sparsity="2:4"), dict(preset="best")),
        (dict(preset="best", sparsity="2:4"), dict(preset="paper")),
        (dict(preset="best", sparsity="0.5"), dict(sparsity="2:4")),
        (dict(preset="best", sparsity="2:4"), dict(sparsity="0.5", preset="robust")),
    ],
)
def test_another_preset_or_pattern_takes_back_what_the_recipe_s_own_filled_in(tmp_path, first, then):
    kept = dict(alpha=7.0, ro_rounds=2)
    recipe = PruneConfig(**first, **kept).resolved()
    recipe.to_yaml(tmp_path / "recipe.yaml")
    again = PruneConfig.from_yaml(tmp_path / "recipe.yaml", **then)
    asked = PruneConfig(**first | kept | then | dict(method=recipe.method))
    assert again.resolved().model_dump() == asked.resolved().model_dump()
    assert (again.alpha, again.ro_rounds) == (7.0, 2)
