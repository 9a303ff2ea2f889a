"""The JSON schema of a study file, for editors and for programs that write study files."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from csmae.config import Config
from csmae.settings import FIELDS
from csmae.study.domain import DOMAINS, ChoiceDomain, FloatDomain, IntDomain
from csmae.study.options import Search
from csmae.study.study import FIXED
from csmae.study.values import field_types, find_field, takes_lists


class _Concise(GenerateJsonSchema):
    """Omits what repeats the rest of the schema: titles that are names, and defaults of whole sections."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never set a field's title."""
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Describe a field with a default."""
        if isinstance(schema.get("default"), BaseModel):
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def study_schema() -> dict[str, Any]:
    """Build the JSON schema (draft 2020-12) of a study file: base, space with every field's dotted name, and search."""
    models: list[type[BaseModel]] = [Config, Search, *DOMAINS.values()]
    _, generated = models_json_schema([(model, "validation") for model in models], schema_generator=_Concise)
    definitions, names = generated["$defs"], list(FIELDS.known)
    definitions["FieldName"] = {"enum": names}
    for model in DOMAINS.values():
        definitions[model.__name__]["properties"]["when"]["propertyNames"] = {"$ref": "#/$defs/FieldName"}
    base = definitions.pop("Config")
    base["properties"] |= {name: _value(name) for name in names}
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


def _value(name: str) -> dict[str, Any]:
    """Refer to the schema of a field's value."""
    found = find_field(name)
    assert found
    return _reference(found[0], f"/properties/{name.rpartition('.')[2]}")


def _domain(name: str) -> dict[str, Any]:
    """Describe the domains that a field can have; choices are values of the field."""
    found, types = find_field(name), () if takes_lists(name) else field_types(name)
    ranges: list[type[BaseModel]] = [FloatDomain, IntDomain] if float in types else [IntDomain] if int in types else []
    choices = {"properties": {"choice": {"items": _value(name)}}}
    kinds = [*map(_reference, ranges), {"allOf": [_reference(ChoiceDomain), choices]}]
    return {"description": found and found[1].description, "oneOf": kinds}


def _reference(model: type[BaseModel], pointer: str = "") -> dict[str, Any]:
    return {"$ref": f"#/$defs/{model.__name__}{pointer}"}
