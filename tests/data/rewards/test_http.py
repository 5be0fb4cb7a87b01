import asyncio
import json
import threading
import time

import pytest

from rlkit.data.rewards.functions import load, locate
from rlkit.data.rewards.http import Refused, post, post_and_wait
from rlkit.data.rewards.pool import RewardItem, RewardPool
from rlkit.errors import ConfigError
from rlkit.settings import Reward
from rlkit.types import RewardStatus


def items(*texts):
    return [
        RewardItem(sample_id=f"s{i}", group_id="g", prompt="p", completion=text, columns={"answer": "a"})
        for i, text in enumerate(texts)
    ]


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(serve):
    busy = serve(lambda number, body: (503, "") if number < 3 else (200, '{"ok": 1}'))
    assert asyncio.run(post(busy.url, {}, deadline_s=5.0)) == {"ok": 1}
    assert len(busy.seen) == 3
    refusing = serve(lambda number, body: (403, ""))
    with pytest.raises(OSError, match="answered 403"):
        asyncio.run(post(refusing.url, {}, deadline_s=5.0))
    assert len(refusing.seen) == 1


def test_code_that_is_not_async_waits_the_same_way(serve):
    busy = serve(lambda number, body: (599, "") if number < 2 else (200, '{"ok": 1}'))
    assert post_and_wait(busy.url, {}, deadline_s=5.0) == {"ok": 1}
    assert len(busy.seen) == 2
    with pytest.raises(Refused, match="answered 404") as raised:
        post_and_wait(serve(lambda number, body: (404, "")).url, {}, deadline_s=5.0)
    assert raised.value.status == 404


def test_a_redirect_is_not_followed_with_the_key(serve):
    elsewhere = serve(lambda number, body: (200, "{}"))
    server = serve(lambda number, body: (302, ""), Location=elsewhere.url)
    with pytest.raises(Refused, match="answered 302"):
        asyncio.run(post(server.url, {}, deadline_s=5.0, headers={"Authorization": "Bearer canary"}))
    assert not elsewhere.seen


def test_an_answer_that_breaks_off_is_asked_for_again(serve):
    server = serve(lambda number, body: (200, "{}"), **{"Content-Length": "1000"})
    with pytest.raises(OSError, match="the connection broke within the answer"):
        post_and_wait(server.url, {}, deadline_s=1.0)
    assert len(server.seen) >= 2


def test_there_is_a_deadline(serve, stuck):
    slow = serve(lambda number, body: stuck.wait(100) and (200, "{}"))
    began = time.monotonic()
    with pytest.raises(OSError, match="timed out"):
        asyncio.run(post(slow.url, {}, deadline_s=0.3))
    with pytest.raises(OSError, match="refused"):
        asyncio.run(post("http://127.0.0.1:9", {}, deadline_s=0.5))
    assert time.monotonic() - began < 20


def test_remote_rewards_are_under_way_together(serve, monkeypatch, tmp_path):
    fourth = threading.Event()

    def answer(number, body):
        if number == 4:
            fourth.set()
        fourth.wait(5)
        return 200, json.dumps({"reward": None if body["completion"] == "?" else float(body["columns"]["answer"] == "a")})

    server = serve(answer)
    monkeypatch.setenv("RLKIT_REWARD_URL", server.url)
    settings = Reward(fn="remote", num_workers=1, calls_at_once=8, timeout_s=30.0)
    with RewardPool(settings.fn, settings, base_dir=tmp_path) as pool:
        results = pool.score(items(*"1234567?"))
    assert [each.reward for each in results] == [1.0] * 7 + [None]
    assert server.most_under_way >= 4


def test_no_more_calls_a_second_than_allowed(serve, monkeypatch, tmp_path):
    server = serve(lambda number, body: (200, '{"reward": 1}'))
    monkeypatch.setenv("RLKIT_REWARD_URL", server.url)
    settings = Reward(fn="remote", num_workers=2, max_calls_per_s=20.0, timeout_s=30.0)
    with RewardPool(settings.fn, settings, base_dir=tmp_path) as pool:
        began = time.monotonic()
        pool.score(items(*map(str, range(20))))
        assert time.monotonic() - began > 0.9


def test_only_async_functions_have_several_calls_under_way(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions): return [1.0]")
    settings = Reward(fn="mine.py:f", calls_at_once=4)
    with pytest.raises(ConfigError, match=r"is not async, and one call of it keeps its worker. Write reward.num_workers"):
        RewardPool(settings.fn, settings, base_dir=tmp_path)


def test_one_of_the_calls_under_way_can_be_late_or_raise_alone(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import asyncio\nasync def f(completions):\n"
        "    if completions == ['late']: await asyncio.sleep(100)\n"
        "    if completions == ['raise']: raise KeyError('x')\n"
        "    if completions == ['block']: import time; time.sleep(100)\n"
        "    return [1.0]"
    )

    def pool_with(timeout_s):
        settings = Reward(fn="mine.py:f", calls_at_once=4, num_workers=1, timeout_s=timeout_s, max_error_rate=1.0)
        return RewardPool(settings.fn, settings, base_dir=tmp_path)

    with pool_with(2.0) as pool:
        fine = RewardStatus.ok
        assert [r.status for r in pool.score(items("1", "late", "raise", "2"))] == [
            fine,
            RewardStatus.timeout,
            RewardStatus.error,
            fine,
        ]
    with pool_with(0.3) as pool:
        blocked = pool.score(items("1", "block"))  # it held the event loop: whatever shared it is lost with it or tried again
        assert blocked[1].status is RewardStatus.timeout


def test_a_judge_marks_what_it_is_shown(serve, monkeypatch, tmp_path):
    def answer(number, body):
        said = body["messages"][0]["content"]
        mark = "no idea" if "dunno" in said else "Mark: 7.5"
        return 200, json.dumps({"choices": [{"message": {"content": mark}}]})

    server = serve(answer)
    for name, value in (("URL", server.url), ("MODEL", "m"), ("KEY", "canary")):
        monkeypatch.setenv(f"RLKIT_JUDGE_{name}", value)
    settings = Reward(fn="judge", num_workers=1, max_error_rate=1.0)
    with RewardPool(settings.fn, settings, base_dir=tmp_path) as pool:
        good, none = pool.score(items("four", "dunno"))
    assert (good.reward, good.status) == (0.75, RewardStatus.ok)
    assert (none.reward, none.status) == (None, RewardStatus.error)
    assert "the judge gave no mark" in none.message
    assert server.seen[0].authorization == "Bearer canary"
    assert "<reference>\na\n</reference>" in server.seen[0].body["messages"][0]["content"]


def test_a_missing_address_is_named_before_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("RLKIT_REWARD_URL", raising=False)
    settings = Reward(fn="remote")
    with pytest.raises(ConfigError, match=r"^the environment variable RLKIT_REWARD_URL is not set: export RLKIT_REWARD_URL=<where"):
        RewardPool(settings.fn, settings, base_dir=tmp_path)


@pytest.fixture
def judged(serve, monkeypatch, tmp_path):
    """What a judge that replies with the given text makes of a completion, and what it was asked."""

    def of(reply, columns=None, **variables):
        server = serve(lambda number, body: (200, json.dumps({"choices": [{"message": {"content": reply}}]})))
        for name, value in ({"URL": server.url, "MODEL": "m"} | variables).items():
            monkeypatch.setenv(f"RLKIT_JUDGE_{name}", value)
        settings = Reward(fn="judge", num_workers=1, max_error_rate=1.0)
        item = RewardItem(sample_id="s", group_id="g", prompt="2+2?", completion="{4}", columns=columns or {})
        with RewardPool(settings.fn, settings, base_dir=tmp_path) as pool:
            return pool.score([item])[0], server.seen[0].body

    return of


def test_a_judge_can_be_asked_in_other_words_and_reason_before_its_mark(judged, tmp_path):
    (tmp_path / "ask.txt").write_text('{completion} to {prompt} by {rubric}: {{"Mark": n}}{reference}')
    reply = "At first I thought Mark: 2, but\nMark: 9"
    found, asked = judged(reply, {"rubric": "rigour"}, PROMPT="ask.txt", MAX_TOKENS="300")
    assert found.reward == 0.9
    assert (asked["messages"][0]["content"], asked["max_tokens"]) == ('{4} to 2+2? by rigour: {"Mark": n}', 300)
    found, asked = judged(reply, {"rubric": "rigour", "answer": "4"}, PROMPT="ask.txt")
    assert asked["messages"][0]["content"].endswith("<reference>\n4\n</reference>\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"RLKIT_JUDGE_PROMPT=ask.txt: .*No such file"),
        ("{prompt}", r"RLKIT_JUDGE_PROMPT=ask.txt: the judge would not see the completion. Write \{completion\} into it"),
        ("{completion} {0}", r"RLKIT_JUDGE_PROMPT=ask.txt: \{0\} is no field's name"),
        ("{completion} {", r"RLKIT_JUDGE_PROMPT=ask.txt: .*double other braces"),
        ("{completion} {rubric}", r"RLKIT_JUDGE_PROMPT asks for a column rubric, and a row's columns are level\."),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused(judged, tmp_path, template, message):
    if template is not None:
        (tmp_path / "ask.txt").write_text(template)
    with pytest.raises(ConfigError, match=message):
        judged("Mark: 1", {"level": 3}, PROMPT="ask.txt")


@pytest.mark.parametrize("written", ["0", "many", "-3"])
def test_a_length_of_a_reply_that_is_none_is_refused(judged, written):
    with pytest.raises(ConfigError, match=rf"RLKIT_JUDGE_MAX_TOKENS={written}: no length of a reply"):
        judged("Mark: 1", MAX_TOKENS=written)


@pytest.mark.parametrize("fn", ["remote", "judge"])
def test_requests_end_by_themselves_before_the_call_does(serve, monkeypatch, tmp_path, fn):
    busy = serve(lambda number, body: (503, ""))
    for name in ("RLKIT_REWARD_URL", "RLKIT_JUDGE_URL", "RLKIT_JUDGE_MODEL"):
        monkeypatch.setenv(name, busy.url)
    settings = Reward(fn=fn, num_workers=1, max_error_rate=1.0, timeout_s=3.0)  # the last attempt is after 1.4 s
    with RewardPool(fn, settings, base_dir=tmp_path) as pool:
        [found] = pool.score(items("4"))
    assert (found.status, "answered 503" in found.message) == (RewardStatus.error, True), found.message


@pytest.mark.parametrize("fn", ["remote", "judge"])
def test_requests_have_most_of_the_time_that_a_call_has(monkeypatch, tmp_path, fn):
    given = []

    async def post(url, body, *, deadline_s, headers=None):
        given.append(deadline_s)
        return {"reward": 1.0, "choices": [{"message": {"content": "Mark: 10"}}]}

    for name in ("RLKIT_REWARD_URL", "RLKIT_JUDGE_URL", "RLKIT_JUDGE_MODEL"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr("rlkit.data.rewards.http.post", post)
    monkeypatch.setattr("rlkit.data.rewards.limits._timeout_s", 60.0)
    function, _ = load(locate(fn, tmp_path))
    assert asyncio.run(function(["p"], ["c"])) == [1.0]
    assert given == [48.0]


def test_a_worker_tells_the_limit_of_its_calls(tmp_path):
    (tmp_path / "mine.py").write_text("from rlkit.data.rewards.limits import deadline_s\ndef f(completions): return [deadline_s()]")
    settings = Reward(fn="mine.py:f", num_workers=1, timeout_s=60.0)
    with RewardPool(settings.fn, settings, base_dir=tmp_path) as pool:
        assert pool.score(items("x"))[0].reward == 48.0
