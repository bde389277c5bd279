"""What every set of options shares: unknown names and bad values are refused in one sentence, YAML goes both ways."""

from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from wandapp.errors import WandappError, nearest, shorten
from wandapp.yaml_file import read_mapping


class Options(BaseModel):
    """Options with defaults and descriptions; an unknown name or a bad value raises `WandappError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=4096)

    def __init__(self, **options: Any):
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise WandappError(_one_sentence(error, type(self))) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read true as 1."""
        if isinstance(value, bool) and bool not in _kinds(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("must not be true or false")
        return value

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """The options in a YAML file; an override wins over the file's value."""
        return cls._of_file(path, read_mapping(path, "recipe"), overrides)

    @classmethod
    def _of_file(cls, path: str | Path, found: dict[str, Any], overrides: dict[str, Any]) -> Self:
        """These options; what is wrong with those that were found in the file names it."""
        try:
            return cls(**found | overrides)
        except WandappError as error:
            if cls._complaint(overrides) == str(error):
                raise
            raise WandappError(f"{path}: {error}") from None

    @classmethod
    def _complaint(cls, options: dict[str, Any]) -> str | None:
        try:
            cls(**options)
        except WandappError as error:
            return str(error)
        return None

    def to_yaml(self, path: str | Path) -> None:
        """Write the options; `from_yaml` reads them back unchanged."""
        Path(path).write_text(self.dump_yaml(), encoding="utf-8")

    def dump_yaml(self) -> str:
        """The options as YAML text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def with_values(self, values: dict[str, Any]) -> Self:
        """The same with every field that is None filled in from `values`."""
        own = self.model_dump()
        return type(self)(**own | {key: value for key, value in values.items() if own[key] is None})


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that a field takes."""
    return get_args(annotation) or (annotation,)


def _one_sentence(error: ValidationError, kind: type[Options]) -> str:
    """What is wrong with the first bad option, and the way out."""
    details = error.errors(include_url=False)
    for detail in details:
        if detail["type"] == "extra_forbidden":
            name = str(detail["loc"][0])
            return f"option {shorten(name)!r} does not exist; {nearest(name, kind.model_fields, limit=12)}"
    detail = details[0]
    own_error = detail.get("ctx", {}).get("error")
    if isinstance(own_error, WandappError):
        return shorten(own_error, 500)
    name = str(detail["loc"][0])
    rule = str(own_error or detail["msg"]).replace("Input should be", "must be")
    return f"{name}: {rule}, got {shorten(repr(detail['input']))} ({kind.model_fields[name].description})"
