"""Methods and refiners by name. `method[+refiner]...`, e.g. "wanda", "sparsegpt+ro", "wanda++"."""

from collections.abc import Iterable

from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.errors import WandappError, nearest, shorten
from wandapp.methods.admm import ADMM
from wandapp.methods.base import Method
from wandapp.methods.gblm import GBLM
from wandapp.methods.magnitude import Magnitude
from wandapp.methods.reconstruct import Reconstruction
from wandapp.methods.rgs import RegionalGradientScore
from wandapp.methods.ro import RegionalOptimisation
from wandapp.methods.sparsegpt import SparseGPT
from wandapp.methods.wanda import Wanda
from wandapp.methods.wanda_cumulative import WandaCumulative

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "wanda-cumulative": WandaCumulative,
    "sparsegpt": SparseGPT,
    "admm": ADMM,
    "gblm": GBLM,
    "rgs": RegionalGradientScore,
}
REFINERS = {"ro": RegionalOptimisation, "reconstruct": Reconstruction}
ALIASES = {"wanda++": "rgs+ro"}
MAX_REFINERS = 8  # of one method
# Who reads an option that does not begin with the name of its only reader: methods, refiners, and parts of a run.
_READERS = {
    "alpha": ("rgs", "gblm"),
    "alpha_unit": ("rgs",),
    "regional_loss": ("rgs",),
    "damping": ("sparsegpt", "admm"),
    "reconstruct_compute": ("reconstruct", "tuning"),
    "tune_lr": ("tuning",),
    "self_temperature": ("own text",),
    "owl_outlier": ("owl",),
    "allocate_spread": ("owl", "error"),
}


def resolve(name: str) -> tuple[str, ...]:
    """Registry names of a method and its refiners: "wanda++" -> ("rgs", "ro")."""
    method, *refiners = ALIASES.get(name, name).split("+")
    if method not in METHODS:
        raise WandappError(f"method {shorten(name)!r} does not exist; {nearest(name, [*METHODS, *ALIASES])}")
    if len(refiners) > MAX_REFINERS:
        raise WandappError(f"method {shorten(name)!r} has {len(refiners)} refiners; {MAX_REFINERS} are the most")
    for refiner in refiners:
        if refiner not in REFINERS:
            raise WandappError(
                f"method {shorten(name)!r}: refiner {shorten(refiner)!r} does not exist; {nearest(refiner, REFINERS)}"
            )
    return method, *refiners


def unread(config: PruneConfig, options: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Those of `options` that a run of `config`, resolved, does not read, and who would."""
    used = {*resolve(config.method), config.allocate}
    used |= {"tuning"} if config.tune_passes else set()
    used |= {"own text"} if config.self_samples or config.calibration == "self" else set()
    found = {}
    for option in sorted(options):
        owner = option.partition("_")[0]
        readers = _READERS.get(option) or ((owner,) if owner in METHODS | REFINERS else ())
        if readers and not used & set(readers):
            found[option] = readers
    return found


def create(config: PruneConfig, ranks: Ranks) -> Method:
    """The method object that a configuration asks for, refiners wrapped around it in order, shared by these ranks."""
    name, *refiners = resolve(config.method)
    method = METHODS[name](config, ranks)
    for refiner in refiners:
        method = REFINERS[refiner](config, method)
    if config.is_allocated and not method.scorer.is_exact:
        raise WandappError(
            f"--allocate {config.allocate} counts out every zero, which {config.method} does not; use --allocate uniform"
        )
    return method
