import json

import pyarrow
import pyarrow.parquet
import pytest

from rlkit.data.files import first_rows, read_table
from rlkit.errors import DataError

ROWS = [{"prompt": str(number)} for number in range(5)]


def test_the_first_rows_of_either_kind_of_file(tmp_path):
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    lines.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    for file in (lines, table):
        assert first_rows("--data", str(file), 3) == ROWS[:3]
        assert first_rows("--data", str(file)) == ROWS
    assert [row.label for row in read_table("data.path", str(lines))] == [f"line {1 + 2 * number}" for number in range(5)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{}\n[]\n", "line 2 is a JSON list, not an object"),
        (b"{}\n{\n", "line 2 is not JSON: Expecting property name"),
        (b'{"a": "\xff"}', "line 1 is not UTF-8 at byte 7"),
        (b"[" * 100_000, "line 1 is not JSON: maximum recursion depth"),
        (b"\n \n", "it has no rows"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, content, problem):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"^--data={file}: {problem}"):
        first_rows("--data", str(file), 3)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(DataError, match=r"^--data=.*gone: there is no such file"):
        first_rows("--data", str(tmp_path / "gone"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"^data.path=.*: not a readable parquet file"):
        read_table("data.path", str(tmp_path / "torn.parquet"))
