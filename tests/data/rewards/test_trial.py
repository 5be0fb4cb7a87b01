import json

import pytest

from rlkit.data.rewards.trial import HOSTILE, try_function
from rlkit.errors import ConfigError, DataError
from rlkit.settings import Reward

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4", "completions": ["4", "5"]}]


@pytest.fixture
def trial(tmp_path):
    def of(source, rows=ROWS, timeout_s=5.0, **settings):
        (tmp_path / "mine.py").write_text(source)
        given = Reward(fn="mine.py:f", timeout_s=timeout_s, num_workers=1, max_error_rate=1.0, **settings)
        return try_function(given, rows, base_dir=tmp_path)

    return of


def test_a_sound_function(trial):
    found = trial("def f(prompt, completion, answer): return float(completion.strip() == answer)")
    assert found.is_sound
    assert found.verdict == f"mine.py:f: nothing wrong was found in {len(HOSTILE) + 6} calls."
    rewards = {(case.row, case.name): case.result.reward for case in found.cases}
    assert (rewards[0, "its answer"], rewards[0, "another answer"], rewards[1, "completion 0"], rewards[1, "completion 1"]) == (
        1,
        0,
        1,
        0,
    )
    shown = str(found).splitlines()
    assert shown[0] == found.verdict
    assert shown[1].startswith("convention plain; ")
    assert "p50" in shown[2]
    assert "p99" in shown[2]
    assert json.loads(json.dumps(found.to_json()))["sound"] is True


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        (
            "def f(completion, answer): return answer[5]",
            r"fails on 21 of 21 calls; first on row 0, its answer: IndexError: .*mine.py:1",
        ),
        (
            "def f(completion, answer): return float(completion)",
            r"fails on \d+ of 21 calls \(.*empty.*\); first on row 0, .*ValueError",
        ),
        ("def f(completion, answer): return float('nan')", r"fails on 21 of 21 calls; .*returned nan"),
        ("def f(completion, answer): return None", r"returns None for every sample"),
        ("def f(completion, answer): return 0.5", r"gives every completion the same reward, 0.5"),
        (
            "def f(completion, answer): return float('#' + answer in completion) + 0.1 * ('{' in completion)",
            r"own answer 0 on average",
        ),
        (
            "n = 0\ndef f(completion, answer):\n    global n\n    n += 1\n    return n * (completion == answer)",
            r"gives the same completion different rewards when it is called again",
        ),
        (
            "import time\ndef f(completion, answer):\n    len(completion) > 999 and time.sleep(9)\n    return completion == answer",
            r"fails on 8 of 21 calls \(huge.*no answer within reward.timeout_s=0.5",
        ),
    ],
)
def test_the_first_line_says_what_is_wrong(trial, source, verdict):
    found = trial(source, timeout_s=0.5 if "sleep" in source else 5.0)
    import re

    assert re.search(verdict, found.verdict), found.verdict


def test_what_would_stop_a_run_is_raised(trial):
    with pytest.raises(
        DataError, match=r"needs a column solution, and 2 of 2 rows have none. The columns are prompt, answer, compl"
    ):
        trial("def f(completions, solution): ...")
    with pytest.raises(DataError, match=r"returned a float .*not a list of 1 numbers or None"):
        trial("def f(completions): return 1.0")
    with pytest.raises(ConfigError, match=r"importing it raised NameError: name 'gone' is not defined .mine.py:1"):
        trial("gone")
