import re
from pathlib import Path

import pytest

from rlkit.data.processes.user_code import describe
from rlkit.data.rewards.functions import load, locate
from rlkit.data.rewards.pool import RewardItem, RewardPool
from rlkit.errors import ConfigError
from rlkit.settings import Reward


def test_a_bare_name_is_a_shipped_function(tmp_path):
    location = locate("exact_match", tmp_path)
    assert location.file is not None
    assert (location.file.name, location.member) == ("exact_match.py", "reward")
    with pytest.raises(ConfigError, match=r"reward.fn=exact: reward_fns/ has code_tests, .*numeric_match.* or file.py:function"):
        locate("exact", tmp_path)
    for name in ("my_rewards.py", "../exact_match", ""):
        with pytest.raises(ConfigError, match=r"Write one of these, or file.py:function"):
            locate(name, tmp_path)


def test_a_missing_file_or_function_is_answered_with_those_that_exist(tmp_path):
    (tmp_path / "mine.py").write_text("from math import sqrt\ndef good(completions): ...\ndef other(completions): ...\n")
    with pytest.raises(ConfigError, match=rf"there is no file {tmp_path}/my.py. Python files in {tmp_path}: mine.py"):
        locate("my.py:good", tmp_path)
    with pytest.raises(ConfigError, match=r"no such folder"):
        locate("gone/my.py:good", tmp_path)
    with pytest.raises(ConfigError, match=r"there is no godo in it. It has good, other"):
        load(locate("mine.py:godo", tmp_path))
    for name in ("mine.py:", ":good", "mine.py:a.b"):
        with pytest.raises(ConfigError, match=r"write file.py:name or package.module:name"):
            locate(name, tmp_path)


def test_a_module_is_found_without_importing_its_package(tmp_path: Path):
    package = tmp_path / "judges_for_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "strict.py").write_text("")
    assert locate("judges_for_test.strict:f", tmp_path).module == "judges_for_test.strict"
    with pytest.raises(ConfigError, match=r"there is no module judges_for_test.lax; judges_for_test has strict"):
        locate("judges_for_test.lax:f", tmp_path)
    with pytest.raises(ConfigError, match=r"there is no module judging; .* has judges_for_test"):
        locate("judging:f", tmp_path)
    with pytest.raises(ConfigError, match=r"judges_for_test.strict is a module, not a package"):
        locate("judges_for_test.strict.deep:f", tmp_path)


@pytest.mark.parametrize(
    ("source", "summary"),
    [
        ("def f(completions):\n    return [(1.0]\n", r"SyntaxError: .*\(mine.py:2\)"),
        ("import other_for_test", r"SyntaxError: '\(' was never closed \(other_for_test.py:1\)"),
        ("import gone_for_test", r"ModuleNotFoundError: No module named 'gone_for_test' \(mine.py:1\)"),
        ("def f(): ...\neval('1 +')", r"SyntaxError: invalid syntax \(mine.py:2\)"),
    ],
)
def test_what_a_file_raises_is_told_with_its_place(tmp_path, source, summary):
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "other_for_test.py").write_text("x = (1")
    with pytest.raises((SyntaxError, ImportError)) as raised:
        load(locate("mine.py:f", tmp_path))
    assert re.fullmatch(summary, describe(raised.value)["summary"]), describe(raised.value)["summary"]


def test_a_verdict_does_not_say_more_than_fits(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from rlkit.data.rewards import wrong\ndef f(completions): return [wrong(message='no ' * 10**6)]"
    )
    settings = Reward(fn="mine.py:f", num_workers=1)
    with RewardPool(settings.fn, settings, base_dir=tmp_path) as pool:
        item = RewardItem(sample_id="s", group_id="g", prompt="p", completion="c", columns={})
        assert pool.score([item])[0].message == ("no " * 167)[:500]
