"""The command `wandapp recover`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from wandapp import cli_hub
from wandapp.cli_options import Json, Overwrite, Private, PrunedFolder, PushToHub, Track, with_flags_of
from wandapp.console import Output, duration, fail
from wandapp.errors import WandappError
from wandapp.recover_config import RecoverConfig

commands = typer.Typer()


@commands.command("recover")
@with_flags_of(RecoverConfig)
def recover_command(
    folder: PrunedFolder,
    out: Annotated[Path, typer.Option(help="folder for the trained checkpoint")],
    config: Annotated[Path | None, typer.Option(help="recover.yaml with any of these options; flags win")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue a killed run, bit for bit; begin where there is none")
    ] = False,
    overwrite: Overwrite = False,
    track: Track = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    json_only: Json = False,
    *,
    options: dict[str, Any],
) -> None:
    """Train a pruned checkpoint on some text, zeros kept."""
    output = Output(json_only)
    settings = RecoverConfig.from_yaml(config, **options) if config else RecoverConfig(**options)
    cli_hub.check_push(push_to_hub, private)
    try:
        from wandapp.recovery import recover
        from wandapp.track import tracking

        run = {"checkpoint": str(folder), **settings.resolved().model_dump(mode="json")}
        with tracking(track or (), out, run) as log, output.progress("recover: step") as update:

            def show(step: Any, steps: int) -> None:
                update(step.step, steps, _detail(step), step.seconds * (steps - step.step))
                log(step.step, {"loss": step.loss, "lr": step.lr, "gradient_norm": step.gradient_norm})

            report = recover(
                folder, out, config=settings, resume=resume, overwrite=overwrite, on_step=show, on_note=output.note
            )
    except ImportError as error:
        raise WandappError(f"recover needs {error.name}; install it with: pip install 'wandapp[recover]'") from None
    except KeyboardInterrupt:
        fail("interrupted; the same command with --resume continues from the last saved state")
        raise typer.Exit(3) from None
    output.rows(_summary(report, out))
    output.finish({"out": str(out), **report.to_dict(), **cli_hub.push_and_show(out, push_to_hub, private, output)})


def _detail(step: Any) -> str:
    return f"loss {step.loss:.3f}  {step.tokens / step.seconds:.0f} tokens/s"


def _summary(report: Any, out: Path) -> dict[str, str]:
    perplexities = {
        f"perplexity, {name}": f"{report.before[name]['perplexity']:.2f} -> {after['perplexity']:.2f}"
        for name, after in report.after.items()
    }
    experts = (
        {"experts": f"{report.frozen_experts} linear maps of experts stayed frozen"} if report.frozen_experts else {}
    )
    return {
        "trained": f"{report.how}; {report.trained_weights:,} weights in {report.linears} linear maps",
        "text": f"{report.text}, the last {report.before['held-out']['windows']} of them held out",
        "cost": f"{report.steps} steps, {report.tokens:,} tokens, {duration(report.seconds)}, {report.peak_gib:.2f} GiB",
        "loss": f"{report.first_loss:.3f} -> {report.last_loss:.3f} (means of the first and last tenth)",
        **perplexities,
        **experts,
        "verified": f"{report.pattern} holds, {report.zeros:,} zeros kept",
        "saved": str(out),
    }
