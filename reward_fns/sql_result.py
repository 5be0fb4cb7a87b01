"""Reward 1 for an SQL query whose result on the row's database is that of the reference, 0 otherwise.

The database is SQLite's, in memory, made anew for each query. The model's query needs no sandbox: SQLite itself refuses whatever is
not reading (an authoriser that allows reads and pure functions alone), stops what takes too many steps or too long, and has little
memory and no temporary files.
"""

import re
import sqlite3
import time
from collections import Counter

from rlkit.data.rewards import unparsable, wrong

MAX_STEPS, STEPS_PER_LOOK = 50_000_000, 1000  # of SQLite's machine
MAX_SECONDS = 3.0  # a step may take long; reference and query together stay below the usual reward.timeout_s
MAX_ROWS, MAX_RESULT, MAX_VALUE, MAX_HEAP = 100_000, 32 << 20, 1 << 20, 256 << 20  # the last three in bytes
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FORBIDDEN_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "zeroblob", "randomblob"}
FENCE = re.compile(r"```(?:sql|sqlite)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def reward(prompts, completions, schema, answer, **columns) -> list[float | None]:
    """The column `schema` is the SQL that makes and fills the database, `answer` the reference query.

    The query is the last ```sql block of the completion, or all of it. Results are compared as multisets of rows, in order where
    the reference has an ORDER BY. None where schema or reference do not run.
    """
    return [_score(*row) for row in zip(completions, schema, answer, strict=True)]


def _score(text, schema, reference) -> float | None:
    if not isinstance(schema, str) or not isinstance(reference, str) or not reference.strip():
        return None
    try:
        wanted = _result(schema, reference)
    except (sqlite3.Error, OverflowError, ValueError, MemoryError):
        return None
    blocks = FENCE.findall(text)
    query = (blocks[-1] if blocks else text).strip()
    if not query:
        return unparsable()
    try:
        found = _result(schema, query)
    except sqlite3.Warning as error:  # several statements
        return unparsable(message=str(error)[:100])
    except (sqlite3.Error, OverflowError, ValueError) as error:
        return wrong(message=str(error)[:100])
    except MemoryError:  # SQLite's own limit, not the worker's
        return wrong(message=f"it needs more than {MAX_HEAP >> 20} MiB")
    is_right = found == wanted if _is_ordered(reference) else Counter(found) == Counter(wanted)
    return 1.0 if is_right else wrong()


def _result(schema, query) -> list[tuple]:
    with sqlite3.connect(":memory:") as database:
        database.executescript(f"pragma temp_store = memory; pragma hard_heap_limit = {MAX_HEAP};")
        database.executescript(schema)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
        database.set_authorizer(_authorise)
        looks = iter(range(MAX_STEPS // STEPS_PER_LOOK))
        end = time.monotonic() + MAX_SECONDS
        database.set_progress_handler(lambda: next(looks, None) is None or time.monotonic() > end, STEPS_PER_LOOK)
        rows, size = [], 0
        for row in database.execute(query):
            rows.append(row)
            size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if len(rows) > MAX_ROWS or size > MAX_RESULT:
                raise sqlite3.DataError(f"more than {MAX_ROWS} rows or {MAX_RESULT >> 20} MiB")
    return rows


def _is_ordered(query) -> bool:
    """Whether it has an ORDER BY of its own: that of a subquery or a window orders nothing that is seen."""
    depth, pattern = 0, r"'(?:[^']|'')*'|\"[^\"]*\"|--[^\n]*|/\*.*?\*/|[()]|\border\s+by\b"
    for match in re.finditer(pattern, query, re.IGNORECASE | re.DOTALL):
        depth += {"(": 1, ")": -1}.get(match.group(), 0)
        if depth == 0 and match.group()[:5].lower() == "order":
            return True
    return False


def _authorise(action, first, second, *_) -> int:
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY
