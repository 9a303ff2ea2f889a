"""The JSON schema of a study file, for editors and for programs that write study files."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from csmae.config import Config
from csmae.settings import field_names
from csmae.study.domain import DOMAINS, ChoiceDomain, FloatDomain, IntDomain
from csmae.study.options import Search
from csmae.study.study import FIXED
from csmae.study.values import field_types, takes_lists


class _Untitled(GenerateJsonSchema):
    """Leaves out titles that repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


def study_schema() -> dict[str, Any]:
    """Build the JSON schema (draft 2020-12) of a study file: base, space with every field's dotted name, and search."""
    models: list[type[BaseModel]] = [Config, Search, *DOMAINS.values()]
    _, generated = models_json_schema([(model, "validation") for model in models], schema_generator=_Untitled)
    definitions, names = generated["$defs"], field_names()
    for model in DOMAINS.values():
        definitions[model.__name__]["properties"]["when"]["propertyNames"] = {"enum": names}
    base = definitions.pop("Config")
    base["properties"] |= {name: _field(name) for name in names}
    domains = {name: _domain(name) for name in names if not name.startswith(FIXED)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "CSMAE study",
        "type": "object",
        "additionalProperties": False,
        "required": ["space"],
        "properties": {
            "base": base,
            "space": {"type": "object", "additionalProperties": False, "minProperties": 1, "properties": domains},
            "search": {"$ref": "#/$defs/Search"},
        },
        "$defs": definitions,
    }


def _field(name: str) -> dict[str, Any]:
    """Refer to the schema of a field."""
    model: Any = Config
    *sections, last = name.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    return _reference(model, f"/properties/{last}")


def _domain(name: str) -> dict[str, Any]:
    """Describe the domains that a field can have; choices are values of the field."""
    types = () if takes_lists(name) else field_types(name)
    ranges: list[type[BaseModel]] = [FloatDomain, IntDomain] if float in types else [IntDomain] if int in types else []
    choices = {"properties": {"choice": {"items": _field(name)}}}
    return {"oneOf": [*map(_reference, ranges), {"allOf": [_reference(ChoiceDomain), choices]}]}


def _reference(model: type[BaseModel], pointer: str = "") -> dict[str, Any]:
    return {"$ref": f"#/$defs/{model.__name__}{pointer}"}
