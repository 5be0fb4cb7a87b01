"""Reward 1 for an SQL query whose result on the row's database is that of the reference, 0 otherwise.

The database is SQLite's, in memory, made anew for each query. The model's query needs no sandbox: SQLite itself refuses whatever is
not reading (an authoriser that allows reads and pure functions alone), and stops what takes too many steps.
"""

import re
import sqlite3
from collections import Counter

from rlkit.data.rewards import unparsable, wrong

MAX_STEPS, STEPS_PER_LOOK = 50_000_000, 10_000  # of SQLite's machine
MAX_ROWS = 100_000
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FORBIDDEN_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "zeroblob", "randomblob"}
FENCE = re.compile(r"```(?:sql|sqlite)?[ \t]*\n(.*?)```", re.DOTALL)


def reward(prompts, completions, schema, answer, **columns) -> list[float | None]:
    """The column `schema` is the SQL that makes and fills the database, `answer` the reference query.

    The query is the last ```sql block of the completion, or all of it. Results are compared as multisets of rows, in order where
    the reference has an ORDER BY. None where schema or reference do not run.
    """
    return [_score(*row) for row in zip(completions, schema, answer, strict=True)]


def _score(text, schema, reference) -> float | None:
    blocks = FENCE.findall(text)
    query = (blocks[-1] if blocks else text).strip()
    try:
        wanted = _result(schema, reference)
    except sqlite3.Error:
        return None
    if not query:
        return unparsable()
    try:
        found = _result(schema, query)
    except sqlite3.Warning as error:  # several statements
        return unparsable(message=str(error)[:100])
    except (sqlite3.Error, OverflowError, ValueError) as error:
        return wrong(message=str(error)[:100])
    in_order = re.search(r"\border\s+by\b", reference, re.IGNORECASE) is not None
    is_right = found == wanted if in_order else Counter(found) == Counter(wanted)
    return 1.0 if is_right else wrong()


def _result(schema, query) -> list[tuple]:
    with sqlite3.connect(":memory:") as database:
        database.executescript(schema)
        database.set_authorizer(_authorise)
        looks = iter(range(MAX_STEPS // STEPS_PER_LOOK))
        database.set_progress_handler(lambda: next(looks, None) is None, STEPS_PER_LOOK)
        rows = database.execute(query).fetchmany(MAX_ROWS + 1)
    if len(rows) > MAX_ROWS:
        raise sqlite3.DataError(f"more than {MAX_ROWS} rows")
    return rows


def _authorise(action, first, second, *_) -> int:
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY
