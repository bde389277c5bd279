"""A run's figures, step by step, for the eyes: tensorboard or wandb by name. A JSONL file lies beside a run in any case."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from wandapp.errors import WandappError, nearest


class Tracker(Protocol):
    """Takes the figures of one step (a block of a pruning run, a step of training)."""

    def log(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """One JSON object a line, on the disk after every step."""

    def __init__(self, folder: Path, run: dict[str, Any]):
        self.file = (folder / "figures.jsonl").open("a", encoding="utf-8")

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorboardTracker:
    """Scalars in an event file under FOLDER/tensorboard."""

    def __init__(self, folder: Path, run: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard")
        self.writer.add_text("run", "\n".join(f"- {name}: {value}" for name, value in run.items()))

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """A run of the project `wandapp`; its files lie in FOLDER/wandb. WANDB_MODE=offline keeps it off the network."""

    def __init__(self, folder: Path, run: dict[str, Any]):
        import wandb

        self.run = wandb.init(project="wandapp", dir=str(folder), config=run)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
}
Log = Callable[[int, dict[str, float]], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raises where a name is none of TRACKERS."""
    for name in names:
        if name not in (*TRACKERS, "none"):
            raise WandappError(f"--track {name}: no such tracker; {nearest(name, (*TRACKERS, 'none'))}")


@contextmanager
def tracking(names: Sequence[str], out: str | Path, run: dict[str, Any]) -> Iterator[Log]:
    """A function (step, figures) that tells every tracker; their files lie in OUT.track, with figures.jsonl.

    names   of TRACKERS, or "none"; with nothing to do nothing is written
    run     what the run is: model, method, ...
    raises  WandappError on an unknown name, and where a tracker's package is not installed
    """
    check_trackers(names)
    chosen = [name for name in dict.fromkeys(names) if name != "none"]
    if not chosen:
        yield lambda step, figures: None
        return
    folder = Path(out).with_name(f"{Path(out).name}.track")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        trackers = [_open(name, folder, run) for name in ("jsonl", *chosen)]
        for tracker in trackers:
            stack.callback(tracker.close)

        def log(step: int, figures: dict[str, float]) -> None:
            for tracker in trackers:
                tracker.log(step, figures)

        yield log


def _open(name: str, folder: Path, run: dict[str, Any]) -> Tracker:
    try:
        return {"jsonl": JsonlTracker, **TRACKERS}[name](folder, run)
    except ImportError as error:
        missing = error.name or name
        raise WandappError(f"--track {name} needs {missing}; install it with: pip install 'wandapp[{name}]'") from None
