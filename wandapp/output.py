"""Output folders that are complete or absent, and the lock that keeps two runs from writing the same one.

Everything is written to OUT.partial, flushed to the disk and renamed to OUT at the end. OUT.partial/wandapp/lock is held
(flock) while a run writes there; the lock dies with its process, so a killed run never blocks the next.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from wandapp.errors import WandappError, shorten

LOCK = "wandapp/lock"
MANIFEST = "wandapp/run.json"  # of a run that can be resumed


def partial_of(out: str | Path) -> Path:
    """Where an output is written before it is complete."""
    return Path(f"{out}.partial")


def check_output(out: str | Path, overwrite: bool = False, source: str | Path | None = None) -> None:
    """Raise unless `output_folder` can write there. Call it before the expensive work; it leaves nothing behind.

    source   what is read meanwhile: `out` may not be it, lie in it or hold it
    """
    out = Path(out)
    try:
        _refuse_occupied(out, overwrite)
        _refuse_overlap(out, source)
        ancestor = next(parent for parent in out.absolute().parents if parent.exists())
        _refuse_long_names(out, ancestor)
        with tempfile.TemporaryDirectory(prefix=".wandapp-", dir=ancestor):  # asks the file system, not the mode bits
            pass
    except OSError as error:
        raise WandappError(
            f"{shorten(out)}: the output folder cannot be made ({error.strerror}); choose another name"
        ) from None


def _refuse_occupied(out: Path, overwrite: bool) -> None:
    if out.is_symlink():
        raise WandappError(f"{out}: the output folder is a link; give the folder itself, or choose another name")
    exists = out.exists()
    if exists and not overwrite:
        raise WandappError(f"{out}: the output folder exists already; choose another name or give --overwrite")
    if exists and not (out / "wandapp" / "recipe.yaml").is_file():
        raise WandappError(
            f"{out}: --overwrite replaces only folders that wandapp wrote (which hold wandapp/recipe.yaml), and this "
            "is none; choose another name"
        )
    if out.name in ("", ".."):
        raise WandappError(f"{out}: the output folder needs a name of its own; choose another name")


def _refuse_overlap(out: Path, source: str | Path | None) -> None:
    """A run that writes into what it reads, or replaces it, would spoil both."""
    if source is None or not os.path.exists(os.path.expanduser(source)):
        return
    out_path, source_path = Path(os.path.realpath(out)), Path(os.path.realpath(os.path.expanduser(source)))
    relations = {
        "is the input itself": out_path == source_path,
        "lies in the input": source_path in out_path.parents and source_path.is_dir(),
        "holds the input": out_path in source_path.parents,
    }
    for relation, holds in relations.items():
        if holds:
            raise WandappError(f"{out}: the output folder {relation}, {source}; choose another name")


def _refuse_long_names(out: Path, ancestor: Path) -> None:
    """Every folder that is to be made, and OUT.partial, must have a name that the file system takes."""
    longest = os.pathconf(ancestor, "PC_NAME_MAX")
    names = out.absolute().relative_to(ancestor).parts
    if any(len(os.fsencode(name)) > longest for name in (*names, f".{out.name}.replaced")):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def refuse_unfinished(out: str | Path) -> None:
    """Raise where an earlier run left finished blocks in OUT.partial, which a new run would throw away."""
    partial = partial_of(out)
    blocks = len(list(partial.glob("model-*.safetensors")))
    if blocks and (partial / MANIFEST).is_file():
        raise WandappError(
            f"{partial}: holds {blocks} finished {'block' if blocks == 1 else 'blocks'} of an interrupted run; continue it "
            "with --resume, or delete that folder to start over"
        )


@contextmanager
def output_folder(out: str | Path, overwrite: bool = False, source: str | Path | None = None) -> Iterator[Path]:
    """A new folder OUT.partial that becomes `out` when the body ends: complete, or not at all.

    Its files are flushed to the disk before the last step, a rename. An older OUT (with `overwrite`) stays until then.
    A failure removes OUT.partial and leaves OUT as it was.

    source  what the body reads (see `check_output`)
    raises  WandappError where `out` exists without `overwrite`, another run writes there, or the disk refuses
    """
    check_output(out, overwrite, source)
    refuse_unfinished(out)
    partial = partial_of(out)
    try:
        with locked(partial, out):
            try:
                clear(partial)
                yield partial
                put_in_place(partial, Path(out))
            except BaseException:  # after success OUT.partial is gone, or already the next run's
                discard(partial)
                raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk with its own class
        raise WandappError(f"{out}: the checkpoint could not be written ({error}); choose another name") from error


@contextmanager
def locked(partial: Path, out: str | Path) -> Iterator[None]:
    """Holds the lock of OUT.partial, which is made where it is missing.

    raises  WandappError where another process holds it, or that folder is not one that wandapp made: it will be cleared
    """
    path = partial / LOCK
    files = (found for found in partial.rglob("*") if not found.is_dir())
    if partial.is_symlink() or partial.is_dir() and not path.exists() and any(files):
        raise WandappError(
            f"{partial}: unfinished output belongs there, and wandapp did not write what is there; move it, or choose "
            "another name"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through a link it would empty somebody else's file.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = path.exists() and os.path.samestat(
                path.stat(), os.fstat(descriptor)
            )  # else: renamed or removed meanwhile
        except BlockingIOError:
            is_ours = False
        if not is_ours:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise WandappError(
                f"{out}: another run (process {owner}) is writing to {partial}; wait for it, or choose another name"
            )
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def clear(partial: Path) -> None:
    """Remove everything in OUT.partial but the lock."""
    for path in (*partial.iterdir(), *(partial / "wandapp").iterdir()):
        if path not in (partial / "wandapp", partial / LOCK):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def discard(partial: Path) -> None:
    """Remove OUT.partial, its lock last: what a kill in between leaves is still known as ours."""
    with suppress(OSError):
        clear(partial)
    shutil.rmtree(partial, ignore_errors=True)


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Write text files by relative path."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def flush_to_disk(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def put_in_place(partial: Path, out: Path) -> None:
    """Rename the complete folder to its final name; an older one is set aside first and put back on failure.

    A process killed between two renames leaves OUT.partial complete, and the older OUT as .OUT.replaced until the next run.
    """
    flush_to_disk(*partial.rglob("*"), partial)
    aside = _aside(out)
    if out.exists():
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
        try:
            partial.rename(out)
        except OSError:
            aside.rename(out)
            raise
    else:
        partial.rename(out)
    flush_to_disk(out.absolute().parent)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove what the last steps of writing `out` needed; also after a process that was killed in them."""
    shutil.rmtree(_aside(out), ignore_errors=True)
    (out / LOCK).unlink(missing_ok=True)
    if not any((out / "wandapp").iterdir()):
        (out / "wandapp").rmdir()


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")
