"""Reward 1 for a completion that is JSON and fits the row's schema, 0 otherwise."""

import json
import re
from typing import NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema_specifications import REGISTRY  # the drafts' own schemas: nothing is fetched from the network
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from rlkit.data.rewards import unparsable, wrong


def reward(prompts, completions, schema, **columns) -> list[float | None]:
    """The column `schema` is a JSON schema (draft 2020-12), as an object or as text. A ```json fence around the JSON is taken
    off, anything else around it is wrong. NaN and Infinity are no JSON, nor is a number of thousands of digits.
    None where the schema is none, or refers to what is not in it."""
    return [_score(text, wanted) for text, wanted in zip(completions, schema, strict=True)]


def _score(text, schema) -> float | None:
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        Draft202012Validator.check_schema(schema)
        _check_references(schema)
    except (ValueError, SchemaError, Unresolvable, RecursionError):
        return None
    fenced = re.fullmatch(r"\s*```(?:json)?[ \t]*\n(.*)\n\s*```\s*", text, re.DOTALL | re.IGNORECASE)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # brackets without end
        return unparsable(message=str(error)[:100])
    validator = Draft202012Validator(schema, registry=REGISTRY)
    try:
        problem = next(validator.iter_errors(value), None)
    except Unresolvable:
        return None
    except (ArithmeticError, RecursionError) as error:  # an integer that no float holds, or one value in another in another
        return wrong(message=str(error)[:100]) if _can_end(validator) else None
    return 1.0 if problem is None else wrong(message=problem.message[:100])


def _check_references(schema) -> None:
    """Raises Unresolvable for a reference that leads nowhere, whichever value it would be needed for."""
    root = DRAFT202012.create_resource(schema)
    left = [(root, REGISTRY.resolver_with_root(root))]
    while left:
        part, resolver = left.pop()
        if isinstance(part.contents, dict) and isinstance(reference := part.contents.get("$ref"), str):
            resolver.lookup(reference)
        left += [(each, resolver.in_subresource(each)) for each in part.subresources()]


def _can_end(validator) -> bool:
    """Whether the schema judges so much as null: one that refers to itself and nothing else judges nothing."""
    try:
        next(validator.iter_errors(None), None)
    except RecursionError:
        return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
