import json

import pytest

from rlkit.data.rewards.trial import HOSTILE, try_function
from rlkit.errors import ConfigError, DataError
from rlkit.settings import Reward

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4", "completions": ["4", "5"]}]


@pytest.fixture
def trial(tmp_path):
    def of(source, rows=ROWS, timeout_s=5.0, options=None, **settings):
        (tmp_path / "mine.py").write_text(source)
        given = Reward(fn="mine.py:f", timeout_s=timeout_s, num_workers=1, max_error_rate=1.0, **settings)
        return try_function(given, rows, base_dir=tmp_path, **options or {})

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


CHAT = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]
TRL = "def f(prompts, completions, answer, **kw): return [float(c[0]['content'] == a) for c, a in zip(completions, answer)]"
RUBRIC = "async def f(completion, answer, **kw): return float(completion[-1]['content'] == answer)"


@pytest.mark.parametrize(
    ("source", "rows", "remedy"),
    [
        (TRL, CHAT, "; it works with --signature trl (reward.signature=trl)"),
        (TRL, ROWS, "; it works with --signature trl --chat (reward.signature=trl data.chat=true)"),
        (RUBRIC, ROWS, "; it works with --signature verifiers (reward.signature=verifiers)"),
        (
            "def f(completion, answer, info=None): return float(completion.strip() == answer)",
            ROWS,
            "; it works with --signature plain (reward.signature=plain)",
        ),
        ("def f(prompts, completions, answer): raise KeyError('x')", ROWS, "KeyError: 'x' (mine.py:1)"),
        ("def f(completion, answer): return float('4')['x']", ROWS, "not subscriptable (mine.py:1)"),
        ("def f(completion, answer): return answer[5] if completion == '2' else completion == answer", ROWS, "range (mine.py:1)"),
    ],
)
def test_another_convention_is_tried_when_a_function_raises(trial, source, rows, remedy):
    found = trial(source, rows=rows)
    assert found.verdict.endswith(remedy), found.verdict
    assert not found.is_sound


def test_the_convention_that_was_offered_is_sound(trial):
    assert trial(TRL, rows=CHAT, signature="trl").is_sound
    assert trial(TRL, signature="trl", options={"chat": True}).is_sound
    assert trial(RUBRIC, signature="verifiers").is_sound
    assert trial(TRL, signature="trl").verdict.endswith("; it works with --chat (data.chat=true)")


def test_columns_that_were_named_and_are_not_there_are_reported(trial):
    sound = "def f(prompt, completion, answer): return float(completion.strip() == answer)"
    for option in ("prompt_column", "answer_column"):
        with pytest.raises(
            DataError, match=rf"--{option.replace('_', '-')} question: .* The columns are prompt, answer, completions"
        ):
            trial(sound, options={option: "question"})
    with pytest.raises(DataError, match=r"--column answer=question: .* The columns are prompt, answer, completions"):
        trial(sound, options={"columns": {"answer": "question"}})


def test_what_no_column_holds_is_noted(trial):
    source = "def f(completions, prompts=None, solution=None, **kw): return [float(len(c)) for c in completions]"
    found = trial(source, rows=[{"question": "1+1=", "completion": "2"}])
    assert found.notes == (
        "takes but does not find: solution; columns: question, completion",
        "there is no column prompt: the function saw an empty one in 1 of 1 rows. --prompt-column names another.",
    )
    assert str(found).splitlines()[3:5] == list(found.notes)
    assert found.to_json()["notes"] == list(found.notes)
    found = trial("def f(completion): return float(len(completion))", rows=[{"prompt": "1+1="}])
    assert found.notes == (
        "there is no column answer, completion or completions: only what breaks parsers was tried. --answer-column names one.",
    )
    assert trial("def f(prompt, completion, answer): return float(completion.strip() == answer)").notes == ()


def test_columns_may_have_other_names(trial):
    source = "def f(prompts, completions, solution): return [float(c.strip() == s) for c, s in zip(completions, solution)]"
    with pytest.raises(
        DataError, match=r"needs a column solution, .*Write --column solution=<.*; in training data.columns.solution="
    ):
        trial(source)
    found = trial(source, options={"columns": {"solution": "answer"}})
    assert found.is_sound, found.verdict
    assert {case.name for case in found.cases} > {"its answer", "another answer"}
    moved = [{"question": row["prompt"], "answer": row["answer"]} for row in ROWS]
    assert trial(source, rows=moved, options={"columns": {"solution": "answer", "prompt": "question"}}).notes == ()


@pytest.mark.parametrize(
    "reward",
    [
        "float(completion != answer)",
        "__import__('random').random()",
        "1.0",
        "None",
        "1 / 0",
    ],
)
def test_only_a_function_without_a_fault_is_sound(trial, reward):
    found = trial(f"def f(completion, answer): return {reward}")
    assert not found.is_sound
    assert found.to_json()["sound"] is False


def test_a_function_that_sees_no_answer_need_not_prefer_it(trial):
    assert trial(
        "def f(completion): return -float(len(completion))", rows=[{"prompt": "", "answer": "12"}, {"answer": "3"}]
    ).is_sound


def test_the_traceback_comes_last(trial):
    found = trial("def g(text): return text.gone\ndef f(completion, answer): return g(completion)")
    assert found.traceback.splitlines()[-1] == "AttributeError: 'str' object has no attribute 'gone'"
    assert str(found).endswith(found.traceback)
    assert found.to_json()["traceback"] == found.traceback
