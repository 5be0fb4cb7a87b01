import asyncio

import pytest

from rlkit.data.rewards import group_wise, signatures
from rlkit.data.rewards.functions import load, locate
from rlkit.data.rewards.signatures import caller, read_signature
from rlkit.errors import ConfigError, DataError
from rlkit.settings import CONVENTIONS


def read(tmp_path, source, convention="auto"):
    (tmp_path / "mine.py").write_text(source)
    return load(locate("mine.py:f", tmp_path), convention)


def call_for(signature, row, *, prompt="1+1=", completion="2", source="sums", ids=(7,), messages=None, turns=None):
    """What the pool would send for one sample."""
    sent = {"prompt": prompt, "completion": completion, "completion_ids": list(ids), "source": source}
    sent |= {"messages": messages, "turns": turns}
    return {name: [sent[name]] for name in signature.fields} | {"columns": {k: [v] for k, v in signature.select(row).items()}}


def answer(tmp_path, source, row, convention="auto", **sent):
    function, signature = read(tmp_path, source, convention)
    returned = caller(function, signature)(call_for(signature, row, **sent))
    return asyncio.run(returned) if asyncio.iscoroutine(returned) else returned


def test_settings_know_the_same_conventions():
    assert tuple(signatures.CONVENTIONS) == CONVENTIONS


@pytest.mark.parametrize(
    ("source", "fields", "columns", "optional", "takes_all"),
    [
        ("def f(prompts, completions, **columns): ...", ("prompt", "completion"), (), (), True),
        ("def f(prompts, completions, answer, level=3): ...", ("prompt", "completion"), ("answer",), ("level",), False),
        ("async def f(completions, *, answer): ...", ("completion",), ("answer",), (), False),
        ("class F:\n def __call__(self, completions, answer): ...\nf = F()", ("completion",), ("answer",), (), False),
    ],
)
def test_columns_are_read_from_the_arguments(tmp_path, source, fields, columns, optional, takes_all):
    _, signature = read(tmp_path, source)
    assert (signature.fields, signature.columns, signature.optional_columns) == (fields, columns, optional)
    assert (signature.convention, signature.takes_all_columns) == ("rlkit", takes_all)
    assert not signature.group_wise


@pytest.mark.parametrize(
    ("arguments", "convention"),
    [
        ("prompts, completions, answer", "rlkit"),
        ("**columns", "rlkit"),
        ("prompts, completions, completion_ids, **kwargs", "trl"),
        ("completions, trainer_state=None, **kwargs", "trl"),
        ("completions, log_metric, **kwargs", "trl"),
        ("completions, answer, log_extra=None", "trl"),
        ("data_source, solution_str, ground_truth, extra_info=None", "verl"),
        ("solution_str, ground_truth", "verl"),
        ("completion, answer, state", "verifiers"),
        ("prompt, completion, info", "verifiers"),
        ("prompt, completion, answer", "plain"),
        ("completion, level=3", "plain"),
    ],
)
def test_a_convention_is_told_by_the_arguments(tmp_path, arguments, convention):
    assert read(tmp_path, f"def f({arguments}): ...")[1].convention == convention


def test_what_no_convention_has_is_refused_with_what_to_write(tmp_path):
    with pytest.raises(ConfigError, match=r"takes \(texts\), and no convention has these. Write def f\(prompts, completions"):
        read(tmp_path, "def f(texts): ...")
    with pytest.raises(ConfigError, match=r"takes parser, which only a verifiers environment has. Give it a default, such as the"):
        read(tmp_path, "def f(completion, parser): ...")


def test_only_the_columns_that_the_function_takes_are_sent(tmp_path):
    row = {"prompt": "p", "answer": "a", "level": 1}
    _, named = read(tmp_path, "def f(completions, answer, level=0, hint=None): ...")
    _, everything = read(tmp_path, "def f(completions, **all): ...")
    assert named.select(row) == {"answer": "a", "level": 1}
    assert everything.select(row) == row
    with pytest.raises(DataError, match=r"needs a column answer. The columns are prompt; write data.columns.answer"):
        named.select({"prompt": "p"})


EXACT = {
    "rlkit": "def f(prompts, completions, answer): return [float(c == a) for c, a in zip(completions, answer)]",
    "trl": "def f(prompts, completions, completion_ids, answer, **kwargs):\n"
    "    assert completion_ids == [[7]]\n    return [float(c == a) for c, a in zip(completions, answer)]",
    "verl": "def f(data_source, solution_str, ground_truth, extra_info=None):\n"
    "    assert (data_source, extra_info) == ('sums', {})\n    return {'score': float(solution_str == ground_truth), 'acc': 1}",
    "verifiers": "def f(completion, answer, state, **kwargs):\n"
    "    assert state['prompt'] == [{'role': 'user', 'content': '1+1='}] and kwargs['task'] == 'sums'\n"
    "    return float(completion[-1]['content'] == answer)",
    "plain": "def f(prompt, completion, answer): return float(completion == answer)",
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("is_async", [False, True])
def test_the_same_reward_in_every_convention(tmp_path, convention, is_async):
    source = EXACT[convention].replace("def f", "async def f") if is_async else EXACT[convention]
    assert read(tmp_path, source)[1].convention == convention
    for completion in ("2", "3"):
        [value] = answer(tmp_path, source, {"answer": "2"}, completion=completion)
        assert (value["score"] if isinstance(value, dict) else value) == float(completion == "2")


def test_arguments_of_a_plain_function_count_by_their_place_when_the_convention_is_named(tmp_path):
    source = "def f(question, reply, truth): return float((question, reply) == ('1+1=', truth))"
    assert answer(tmp_path, source, {"answer": "2"}, "plain") == [1.0]
    with pytest.raises(DataError, match="needs a column answer"):
        answer(tmp_path, source, {"label": "2"}, "plain")


@pytest.mark.parametrize(
    "row", [{"ground_truth": "2"}, {"reward_model": {"style": "rule", "ground_truth": "2"}}, {"answer": "2"}, {"answer": "3"}]
)
def test_verl_rows_are_read_as_verl_has_them(tmp_path, row):
    source = "def f(data_source, solution_str, ground_truth, extra_info): return float(solution_str == ground_truth)"
    assert answer(tmp_path, source, row) == [float("2" in str(row))]
    own = "def f(data_source, solution_str, ground_truth, extra_info): return float((data_source, extra_info['x']) == ('d', 1))"
    assert answer(tmp_path, own, row | {"data_source": "d", "extra_info": {"x": 1}}) == [1.0]
    with pytest.raises(DataError, match="needs a column ground_truth"):
        answer(tmp_path, source, {"label": "2"})


def test_trl_functions_see_messages_where_the_prompt_is_chat(tmp_path):
    source = "def f(prompts, completions, completion_ids): return [float(completions[0][0]['content'] == prompts[0][0]['content'])]"
    chat = [{"role": "user", "content": "2"}]
    assert answer(tmp_path, source, {"prompt": chat}, messages=chat) == [1.0]
    text = "def f(prompts, completions, completion_ids, **kwargs): return [float(completions == ['2'] and 'prompt' not in kwargs)]"
    assert answer(tmp_path, text, {"prompt": "1+1="}) == [1.0]


def test_verifiers_functions_see_messages(tmp_path):
    source = "def f(prompt, completion, info): return float(prompt[-1]['content'] + completion[0]['content'] == info['whole'])"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1="}]
    assert answer(tmp_path, source, {"info": {"whole": "1+1=2"}}, messages=chat) == [1.0]
    assert answer(tmp_path, source, {"info": {"whole": "1+1=2"}}) == [1.0]


def test_functions_that_see_messages_see_all_turns_of_an_episode(tmp_path):
    chat = [{"role": "user", "content": "2+2?"}]
    turns = [
        {"role": "assistant", "content": "calc"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "2"},
    ]
    roles = "[m['role'] for m in completions[0]] == ['assistant', 'tool', 'assistant']"
    source = f"def f(prompts, completions, completion_ids): return [float({roles})]"
    assert answer(tmp_path, source, {"prompt": chat}, messages=chat, turns=turns) == [1.0]
    source = "def f(completion, info): return float(completion[1]['content'] == '4' and completion[-1]['content'] == '2')"
    assert answer(tmp_path, source, {}, messages=chat, turns=turns) == [1.0]
    text = "def f(prompts, completions, completion_ids, **kwargs): return [float(completions == ['2'])]"
    assert answer(tmp_path, text, {"prompt": "2+2="}, turns=turns) == [1.0]  # plain text: the answer


def test_a_group_wise_function_says_so():
    @group_wise
    def f(prompts, completions): ...

    assert read_signature("f", f).group_wise


@pytest.mark.parametrize("convention", ["verl", "verifiers", "plain"])
def test_a_function_that_sees_one_sample_cannot_compare(tmp_path, convention):
    source = f"from rlkit.data.rewards import group_wise\n@group_wise\n{EXACT[convention]}"
    with pytest.raises(ConfigError, match=rf"@group_wise .* the convention {convention} .* Write def f\(prompts, completions"):
        read(tmp_path, source)


@pytest.mark.parametrize("arguments", ["completions, log_metric, log_extra", "completions, completion_ids, **kwargs"])
def test_what_trl_functions_log_goes_nowhere(tmp_path, arguments):
    get = "log_metric, log_extra = kwargs['log_metric'], kwargs['log_extra']\n    " if "kwargs" in arguments else ""
    source = f"def f({arguments}):\n    {get}log_metric('x', 1.0)\n    log_extra(column='y', values=[1])\n    return [1.0]"
    assert answer(tmp_path, source, {}) == [1.0]


def test_columns_that_are_looked_for_and_not_there(tmp_path):
    _, signature = read(tmp_path, "def f(completions, prompts=None, solution=None, answer=None, **kwargs): ...")
    assert signature.unfound(["answer", "label"]) == ["solution"]
    _, signature = read(tmp_path, "def f(data_source, solution_str, ground_truth, extra_info=None): ...")
    assert signature.unfound(["answer"]) == []  # what the convention looks for itself may be absent
