"""The packed checkpoint: kept weights and one bit per weight instead of weights and zeros. 2:4 in bf16: 56 % of the bytes.

    config.json, tokenizer, ...              copied from the dense checkpoint
    wandapp/packed.json                      `Manifest`: version, pattern, files, one entry per packed linear map
    packed-00001-of-00032.safetensors        one file per decoder block, and one for everything else

A linear map NAME is stored as NAME.values, NAME.bitmask and, when unstructured, NAME.row_offsets (see
`wandapp.kernels.pack`); all other tensors keep the names they have in the dense checkpoint. Tied weights are stored once.
With storage int8 (format version 2; lossy) the values are int8 and NAME.scale holds one fp32 per row.

Reading trusts nothing: every size is checked against the files before memory is taken for it, and every bitmask against
its values before a kernel sees it. `wandapp.packing` writes.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from wandapp.blocks import LinearView
from wandapp.errors import WandappError
from wandapp.kernels.pack import Packed, bitmask_fault, unpack
from wandapp.pattern import SparsityPattern
from wandapp.weight_files import DTYPES, PACKED_MANIFEST, TensorFiles, refuse_special_files

FORMAT = "wandapp-packed"
VERSIONS = {"same": 1, "int8": 2}  # by storage of the linear maps: who reads version 1 alone reads all but int8
MAX_MANIFEST_BYTES = 16 << 20  # 256 experts in each of 60 blocks take 10 MB

Name = Annotated[str, Field(pattern=r"^[!-~]{1,300}$")]  # what tensors are called: it appears in messages


class PackedLinear(BaseModel):
    """One packed linear map.

    tensor      its name in the dense checkpoint; `name` is that without ".weight", or with the expert's index appended
    shape       (out_features, in_features)
    dtype       of the dense checkpoint's tensor
    storage     "same": values have that dtype; "int8": they are int8, and the weights are scale[row] * value
    transposed  True where the dense checkpoint stores [in, out]
    index       the expert's index where `tensor` is 3-D, else None
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Name
    tensor: Name
    shape: tuple[int, int]
    dtype: Literal["float32", "bfloat16", "float16"]
    transposed: bool = False
    index: int | None = Field(default=None, ge=0)
    storage: Literal["same", "int8"] = "same"

    @property
    def parts(self) -> list[str]:
        """Names of the tensors that may hold it, in the order of `Packed.parts`."""
        return [f"{self.name}.{part}" for part in ("values", "bitmask", "row_offsets", "scale")]


class Manifest(BaseModel):
    """What `wandapp/packed.json` holds. `dense` names the tensors that are stored as they were."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal[FORMAT]  # type: ignore[valid-type]  # the constant's value
    version: Literal[1, 2]
    pattern: Name
    files: list[Name]
    linears: list[PackedLinear]
    dense: list[Name]

    @model_validator(mode="after")
    def _storage_needs_its_version(self) -> "Manifest":
        for linear in self.linears:
            if VERSIONS[linear.storage] > self.version:
                raise ValueError(f"{linear.name}: storage {linear.storage} needs version {VERSIONS[linear.storage]}")
        return self


class PackedCheckpoint:
    """A packed checkpoint, opened and checked: what its manifest names is there, in the sizes it must have.

    linears   packed linear maps by name
    tensors   the tensors of the dense checkpoint by name: the linear maps that make it up, none where it is stored dense
    raises    WandappError naming the file and the rule that is broken
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        refuse_special_files(self.folder)
        manifest = _read_manifest(self.folder / PACKED_MANIFEST)
        self.pattern = SparsityPattern.parse(manifest.pattern)
        self.files = TensorFiles(self._path_of(name) for name in manifest.files)
        self.linears = {linear.name: linear for linear in manifest.linears}
        self.tensors: dict[str, list[PackedLinear]] = {}
        for linear in manifest.linears:
            self.tensors.setdefault(linear.tensor, []).append(linear)
        self._check_names(manifest)
        self.tensors |= {name: [] for name in manifest.dense}
        for linear in manifest.linears:
            self._check_sizes(linear)

    def read_linear(self, name: str) -> Packed:
        """The packed linear map `name`, after its bitmask was checked against its values; mapped from the file."""
        linear = self.linears[name]
        stored = set(self._parts(linear))
        parts = [self.files.read(part) if part in stored else None for part in linear.parts]
        packed = Packed(*parts[:3], linear.shape, self._nm, parts[3])
        fault = bitmask_fault(packed) or scale_fault(packed)
        if fault:
            raise WandappError(f"{self.folder}: {name}: {fault}; fetch or pack the checkpoint again")
        return packed

    def read_tensor(self, name: str) -> Tensor:
        """The tensor `name` as the dense checkpoint has it; a linear map is unpacked, the rest mapped from the file."""
        linears = sorted(self.tensors[name], key=lambda linear: linear.index or 0)
        if not linears:
            return self.files.read(name)
        weights = [
            unpack(self.read_linear(linear.name), dtype=getattr(torch, linear.dtype), trusted=True)
            for linear in linears
        ]
        stored = [weight.T if linears[0].transposed else weight for weight in weights]
        return stored[0].contiguous() if linears[0].index is None else torch.stack(stored)

    def read_view(self, tensor: str, view: LinearView) -> Tensor:
        """Weight [out, in] of one linear map of `tensor`."""
        linears = [linear for linear in self.tensors[tensor] if linear.index == view.index]
        stored, expected = self.shape_of(tensor), tuple(view.parameter.shape)
        if stored != expected:
            raise WandappError(f"{self.folder}: {tensor} is {list(stored)}, config.json asks for {list(expected)}")
        if not linears:
            return view.of(self.files.read(tensor))
        weight = unpack(self.read_linear(linears[0].name), trusted=True)
        return weight if linears[0].transposed == view.transposed else weight.T

    def shape_of(self, tensor: str) -> tuple[int, ...]:
        """Shape of the tensor in the dense checkpoint."""
        linears = self.tensors[tensor]
        if not linears:
            return self.files.infos[tensor].shape
        shape = linears[0].shape[::-1] if linears[0].transposed else linears[0].shape
        return shape if linears[0].index is None else (len(linears), *shape)

    def path_of_tensor(self, name: str) -> Path:
        """The file that holds it, or its first part."""
        linears = self.tensors[name]
        return self.files.infos[linears[0].parts[0] if linears else name].path

    @property
    def storage(self) -> str:
        """How the linear maps are stored: "int8" where any is."""
        return "int8" if any(linear.storage == "int8" for linear in self.linears.values()) else "same"

    @property
    def _nm(self) -> tuple[int, int] | None:
        return self.pattern.n_and_m if self.pattern.is_structured else None

    def _parts(self, linear: PackedLinear) -> list[str]:
        """Names of the tensors that hold it."""
        values, bitmask, row_offsets, scale = linear.parts
        parts = [values, bitmask] + ([] if self.pattern.is_structured else [row_offsets])
        return parts + ([scale] if linear.storage == "int8" else [])

    def _path_of(self, name: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors", name):
            raise WandappError(f"{self.folder}: {PACKED_MANIFEST} names {name!r}, which is no file of this folder")
        return self.folder / name

    def _check_names(self, manifest: Manifest) -> None:
        """Every tensor of the files is named once by the manifest, and the other way round."""
        named = [part for linear in manifest.linears for part in self._parts(linear)] + manifest.dense
        missing = next((name for name in named if name not in self.files.infos), None)
        unnamed = next(iter(self.files.infos.keys() - set(named)), None)
        doubled = len(set(named)) != len(named) or not self.tensors.keys().isdisjoint(manifest.dense)
        if missing or unnamed or doubled:
            fault = f"lacks {missing}" if missing else f"holds {unnamed} unnamed" if unnamed else "names a tensor twice"
            raise WandappError(f"{self.folder}: the packed checkpoint {fault}; fetch or pack it again")
        for tensor, linears in self.tensors.items():
            indices = sorted(-1 if linear.index is None else linear.index for linear in linears)
            alike = len({(linear.shape, linear.dtype, linear.transposed, linear.storage) for linear in linears}) == 1
            if not alike or indices not in ([-1], list(range(len(linears)))):
                raise WandappError(f"{self.folder}: the linear maps of {tensor} do not make one tensor; pack it again")

    def _check_sizes(self, linear: PackedLinear) -> None:
        """The parts have the types and shapes that `linear` promises; the files are known to be as long as that takes."""
        rows, cols = linear.shape
        if rows < 1 or cols < 1:
            raise WandappError(f"{self.folder}: {linear.name} has shape {list(linear.shape)}; both must be positive")
        self.pattern.require_fit(linear.name, cols)
        values = (rows, self.pattern.keep(cols)) if self.pattern.is_structured else None
        value_dtype = "int8" if linear.storage == "int8" else linear.dtype
        rules = [
            (value_dtype, values),
            ("uint8", (rows, (cols + 7) // 8)),
            ("int64", (rows + 1,)),
            ("float32", (rows,)),
        ]
        rule_of = dict(zip(linear.parts, rules, strict=True))
        for part in self._parts(linear):
            dtype, expected = rule_of[part]
            _, stored_dtype, shape = self.files.infos[part]
            found = str(DTYPES.get(stored_dtype, stored_dtype)).removeprefix("torch.")
            if found != dtype or (len(shape) != 1 if expected is None else shape != expected):
                size = "[number of weights]" if expected is None else list(expected)
                raise WandappError(f"{self.folder}: {part} must be {dtype} {size}, got {found} {list(shape)}")


def _read_manifest(path: Path) -> Manifest:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise WandappError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, so it is no manifest of wandapp")
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise WandappError(
            f"{path}: no packed checkpoint here ({error.strerror}); make one with wandapp pack"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:100] or "the file"
        raise WandappError(f"{path}: {place}: {first['msg'].lower()[:200]}; fetch or pack it again") from None


def scale_fault(packed: Packed) -> str | None:
    """Why scale and int8 values are none that packing writes, or None."""
    if packed.scale is None:
        return None
    if not bool((packed.scale.isfinite() & (packed.scale >= 0)).all()):
        return "a scale is negative or not finite"
    return "a value is -128, which the storage never holds" if bool((packed.values == -128).any()) else None
