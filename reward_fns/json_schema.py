"""Reward 1 for a completion that is JSON and fits the row's schema, 0 otherwise."""

import json
import re

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from rlkit.data.rewards import unparsable, wrong


def reward(prompts, completions, schema, **columns) -> list[float | None]:
    """The column `schema` is a JSON schema (draft 2020-12), as an object or as text. A ```json fence around the JSON is taken
    off, anything else around it is wrong. None where the schema is none."""
    return [_score(text, wanted) for text, wanted in zip(completions, schema, strict=True)]


def _score(text, schema) -> float | None:
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        Draft202012Validator.check_schema(schema)
    except (json.JSONDecodeError, SchemaError):
        return None
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (json.JSONDecodeError, RecursionError) as error:  # brackets without end
        return unparsable(message=str(error)[:100])
    problem = next(Draft202012Validator(schema).iter_errors(value), None)
    return 1.0 if problem is None else wrong(message=problem.message[:100])
