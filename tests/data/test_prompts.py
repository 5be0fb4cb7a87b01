import json
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlkit.data.prompts import load_prompts
from rlkit.errors import ConfigError, DataError
from rlkit.settings import (
    BadRow,
    ComparisonData,
    ExpressionsData,
    HuggingFaceData,
    JsonlData,
    MixtureData,
    ParquetData,
    ReasoningGymData,
    TableData,
)

MIXED = [{"prompt": "1+1", "topic": "math"}, {"prompt": "print(1)", "topic": "code"}, {"prompt": "2+2", "topic": 3}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A token per byte, and a beginning-of-sequence token before plain text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"<bos>": 0, **{char: i + 1 for i, char in enumerate(alphabet)}}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


@pytest.fixture
def write(tmp_path):
    def to_jsonl(*rows, name="train.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return to_jsonl


def load(settings, tokenizer, max_prompt_tokens=100, reward_columns=()):
    def missing(source, columns):
        return next((name for name in reward_columns if name not in columns), None)

    return load_prompts(settings, tokenizer, max_prompt_tokens=max_prompt_tokens, missing=missing)


def table(path, cls: Callable[..., TableData] = JsonlData, **settings):
    return cls(path=path, **{"held_out_fraction": 0.0, **settings})


def refused(settings, tokenizer, **limits) -> str:
    with pytest.raises(DataError) as caught:
        load(settings, tokenizer, **limits)
    return str(caught.value)


def test_plain_text_gets_the_tokenizers_special_tokens_and_keeps_its_row(write, tokenizer):
    [prompt] = load(table(write({"prompt": "2+2=", "answer": 4, "id": 7}), id_column="id"), tokenizer).train
    assert prompt.text == "2+2="
    assert prompt.prompt_ids == tuple(tokenizer("2+2=")["input_ids"])
    assert prompt.prompt_ids[0] == tokenizer.bos_token_id
    assert prompt.columns == {"prompt": "2+2=", "answer": 4, "id": 7}
    assert (prompt.id, prompt.source) == ("7", "train.jsonl")


def test_chat_goes_through_the_template_which_brings_its_own_special_tokens(write, chat_tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    path = write({"prompt": "Hi"}, {"prompt": messages})
    plain, chat = load(table(path, chat=True, system_prompt="Be brief."), chat_tokenizer).train
    assert plain.text == chat.text == "<system>Be brief.<user>Hi<assistant>"
    assert plain.prompt_ids == tuple(chat_tokenizer(plain.text, add_special_tokens=False)["input_ids"])
    plain, chat = load(table(path), chat_tokenizer).train  # messages are chat whatever data.chat says
    assert (plain.text, chat.text) == ("Hi", "<user>Hi<assistant>")
    assert plain.prompt_ids[0] == chat_tokenizer.bos_token_id != chat.prompt_ids[0]


@pytest.mark.parametrize("row", [{"prompt": "Hi"}, {"prompt": [{"role": "user", "content": "Hi"}]}])
def test_chat_without_a_template_is_refused(write, tokenizer, row):
    with pytest.raises(ConfigError, match=r"no chat template. Write data.chat=false"):
        load(table(write(row), chat=isinstance(row["prompt"], str)), tokenizer)


def test_a_column_names_the_source_of_each_row(write, tokenizer):
    found = load(table(write(*MIXED), source_column="topic"), tokenizer).train
    assert [prompt.source for prompt in found] == ["math", "code", "3"]
    assert {prompt.source for prompt in load(table(write(*MIXED)), tokenizer).train} == {"train.jsonl"}
    assert "no column subject; set data.source_column" in refused(table(write(*MIXED), source_column="subject"), tokenizer)
    assert "line 4 lacks topic" in refused(table(write(*MIXED, {"prompt": "x"}), source_column="topic"), tokenizer)
    assert "line 1 has no value for topic" in refused(
        table(write({"prompt": "x", "topic": None}), source_column="topic"), tokenizer
    )


def test_a_system_prompt_without_chat_is_refused(write, chat_tokenizer):
    with pytest.raises(ConfigError, match=r"data.system_prompt .* Write data.chat=true"):
        load(table(write({"prompt": "Hi"}), system_prompt="Be brief."), chat_tokenizer)


def test_messages_that_the_template_refuses_are_named(write, chat_tokenizer):
    path = write({"prompt": [{"role": "tool", "content": "x"}]})
    assert "line 1: the model's chat template refuses its messages (no tools here)" in refused(table(path), chat_tokenizer)


def test_columns_are_renamed_and_a_wrong_name_is_answered_with_those_that_exist(write, tokenizer):
    path = write({"question": "1+1=", "solution": "2"})
    [prompt] = load(table(path, columns={"prompt": "question", "answer": "solution"}), tokenizer, reward_columns=["answer"]).train
    assert prompt.columns == {"prompt": "1+1=", "answer": "2"}
    assert "data.columns.answer=soluton" in (message := refused(table(path, columns={"answer": "soluton"}), tokenizer))
    assert "question, solution" in message
    assert "no column prompt; set data.prompt_column. The columns are question, solution" in refused(table(path), tokenizer)
    assert "no column key; set data.id_column" in refused(table(path, prompt_column="question", id_column="key"), tokenizer)
    message = refused(table(path, prompt_column="question"), tokenizer, reward_columns=["answer"])
    assert "the reward function needs a column answer" in message
    assert "data.columns.answer=<one of them>" in message
    reserved = refused(table(path, columns={"prompt": "question", "completions": "solution"}), tokenizer)
    assert "may not be called completions" in reserved


BAD = [
    ("unreadable", b'{"prompt": "caf\xe9", "id": 1}', "line 2 is not UTF-8 at byte 15"),
    ("unreadable", b'{"prompt": ', "line 2 is not JSON"),
    ("unreadable", b"[1]", "line 2 is a JSON list, not an object"),
    ("unreadable", b'{"prompt": "\\ud800", "id": 1}', "line 2 has a prompt that is not Unicode text"),
    ("missing_key", {"id": 1, "prompt_": "x"}, "line 2 lacks prompt; it has id, prompt_"),
    ("missing_key", {"id": 1, "prompt": None}, "line 2 has no value for prompt"),
    ("missing_key", {"prompt": "x"}, "line 2 lacks id"),
    ("missing_key", {"prompt": "x", "id": None}, "line 2 has no value for id"),
    ("empty_prompt", {"id": 1, "prompt": " \n"}, "line 2 has an empty prompt"),
    ("empty_prompt", {"id": 1, "prompt": []}, "line 2 has an empty list of messages"),
    ("empty_prompt", {"id": 1, "prompt": [{"role": "user", "content": ""}]}, "line 2 has only empty messages"),
    ("wrong_type", {"id": 1, "prompt": 5}, "line 2 has a int for a prompt"),
    ("wrong_type", {"id": 1, "prompt": ["Hi"]}, "line 2 has a message that is not"),
    ("wrong_type", {"id": 1, "prompt": [{"role": "assistant", "content": "Hi"}]}, "line 2 ends with an assistant message"),
    ("too_long", {"id": 1, "prompt": "x" * 100}, "line 2 has 101 tokens, max_prompt_tokens=100"),
    ("duplicate_id", {"id": 0, "prompt": "x"}, "line 2 has the id 0 of line 1"),
]


@pytest.mark.parametrize(("kind", "row", "message"), BAD)
def test_a_bad_row_is_shown_or_dropped_and_counted(write, chat_tokenizer, kind, row, message):
    path = write({"id": 0, "prompt": "x"}, row)
    shown = refused(table(path, id_column="id"), chat_tokenizer)
    assert message in shown
    assert "1 of 2 rows" in shown
    assert "data.on_bad_row=drop" in shown
    kept = load(table(path, id_column="id", on_bad_row=BadRow.drop), chat_tokenizer)
    assert [prompt.id for prompt in kept.train] == ["0"]
    assert kept.dropped == {kind: 1}


def test_ten_offenders_are_shown_and_the_rest_counted(write, tokenizer):
    message = refused(table(write({"prompt": "x"}, *[{"prompt": ""}] * 13)), tokenizer)
    assert "13 of 14 rows" in message
    assert message.count("has an empty prompt") == 10
    assert "and 3 more" in message


def test_dropping_every_row_is_an_error(write, tokenizer):
    path = write({"prompt": "x" * 200}, {"prompt": ""})
    assert "no row is left to train on" in refused(table(path, on_bad_row=BadRow.drop), tokenizer)


def test_an_empty_file_and_a_missing_one_are_errors(write, tokenizer, tmp_path):
    assert "has no rows" in refused(table(write()), tokenizer)
    assert "there is no such file" in refused(table(str(tmp_path / "gone.jsonl")), tokenizer)


def test_a_row_stays_in_its_split_when_others_come_and_go(write, tokenizer):
    rows = [{"prompt": f"question {i}", "id": f"q{i}"} for i in range(400)]
    for id_column in ("id", None):
        whole = load(table(write(*rows), id_column=id_column, held_out_fraction=0.2), tokenizer)
        part = load(table(write(*rows[5:]), id_column=id_column, held_out_fraction=0.2), tokenizer)
        held_out = {prompt.text for prompt in whole.held_out}
        assert {prompt.text for prompt in part.held_out} == held_out - {row["prompt"] for row in rows[:5]}
        assert {prompt.text for prompt in whole.train} == {row["prompt"] for row in rows} - held_out
        assert 50 < len(held_out) < 110


def test_the_first_held_out_rows_are_a_sample_that_the_order_of_the_file_does_not_change(write, tokenizer):
    rows = [{"prompt": f"question {i}", "id": i} for i in range(400)]
    found = [load(table(write(*some), id_column="id", held_out_fraction=0.2), tokenizer).held_out for some in (rows, rows[::-1])]
    assert [prompt.id for prompt in found[0]] == [prompt.id for prompt in found[1]]
    first = [int(prompt.id) for prompt in found[0][:20]]
    assert 100 < sum(first) / 20 < 300  # from everywhere in the file


def test_rows_without_an_id_that_ask_the_same_question_share_a_split(write, tokenizer):
    rows = [{"prompt": f"question {i % 30}", "answer": i} for i in range(300)]
    found = load(table(write(*rows), held_out_fraction=0.3), tokenizer)
    assert found.held_out
    assert not {prompt.text for prompt in found.train} & {prompt.text for prompt in found.held_out}
    assert len({prompt.id for prompt in found.train}) == len(found.train)


def test_a_held_out_file_is_used_as_given_and_checked_too(write, tokenizer):
    train, held_out = write({"prompt": "a"}), write({"prompt": "b"}, {"prompt": "c"}, name="test.jsonl")
    found = load(table(train, held_out_path=held_out, held_out_fraction=0.5), tokenizer)
    assert [prompt.text for prompt in found.train] == ["a"]
    assert sorted(prompt.text for prompt in found.held_out) == ["b", "c"]
    assert not {prompt.id for prompt in found.train} & {prompt.id for prompt in found.held_out}
    bad = write({"prompt": "b"}, {"prompt": ""}, name="test.jsonl")
    assert "held_out:line 2 has an empty prompt" in refused(table(train, held_out_path=bad), tokenizer)


def test_all_rows_held_out_is_an_error(write, tokenizer):
    assert "lower data.held_out_fraction" in refused(table(write({"prompt": "a"}), held_out_fraction=0.999999), tokenizer)


def test_parquet_is_read_and_a_bad_string_is_named(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": [1, None]}), path)
    first, second = load(table(path, ParquetData), tokenizer, reward_columns=["answer"]).train
    assert (first.columns["answer"], second.columns["answer"]) == (1, None)  # a reward function may say None to None
    broken = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"a\xff")
    )
    pq.write_table(pa.table({"prompt": broken}), path)
    assert "row 2 is not UTF-8" in refused(table(path, ParquetData), tokenizer)
    (tmp_path / "rows.parquet").write_text("no")
    assert "not a readable parquet file" in refused(table(path, ParquetData), tokenizer)


def test_hugging_face_folders_are_read_by_split(tmp_path, tokenizer):
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    saved = str(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(saved)
    found = load(table(saved, HuggingFaceData, held_out_split="test"), tokenizer)
    assert ([p.text for p in found.train], [p.text for p in found.held_out]) == (["a", "b"], ["b"])
    message = refused(table(saved, HuggingFaceData, split="dev"), tokenizer)
    assert "data.split=dev" in message
    assert "train, test" in message
    files = tmp_path / "files"
    files.mkdir()
    rows.to_json(files / "train.jsonl")
    assert len(load(table(str(files), HuggingFaceData), tokenizer).train) == 2
    assert "datasets could not load it" in refused(table(str(tmp_path / "none"), HuggingFaceData), tokenizer)


def test_reasoning_gym_tasks_are_distinct_questions(chat_tokenizer):
    pytest.importorskip("reasoning_gym")
    settings = ReasoningGymData(
        task="chain_sum", size=300, options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    )
    found = load(settings, chat_tokenizer, max_prompt_tokens=500, reward_columns=["answer", "metadata"])
    texts = [prompt.text for prompt in found.train + found.held_out]
    assert 100 < len(texts) < 300  # 1-digit sums repeat
    assert len(set(texts)) == len(texts)
    assert texts[0].startswith("<user>")
    with pytest.raises(ConfigError, match=r"no such task. Choose one of .*chain_sum"):
        load(ReasoningGymData(task="chain_sums"), chat_tokenizer)
    with pytest.raises(ConfigError, match=r"data.options=.*mini_terms"):
        load(ReasoningGymData(task="chain_sum", options={"mini_terms": 2}), chat_tokenizer)


def test_the_built_in_tasks_hold_out_problems_by_their_own_rules(chat_tokenizer):
    found = load(ExpressionsData(), chat_tokenizer, reward_columns=["digits", "target"])
    problems = [
        {("".join(sorted(p.columns["digits"])), p.columns["target"]) for p in part} for part in (found.train, found.held_out)
    ]
    assert not problems[0] & problems[1]
    assert (len(found.train), len(found.held_out)) == (2562, 273)
    with pytest.raises(ConfigError, match=r"data.held_out_fraction=0.2: the expressions task always holds out 0.1"):
        load(ExpressionsData(held_out_fraction=0.2), chat_tokenizer)
    found = load(ComparisonData(), chat_tokenizer, max_prompt_tokens=200, reward_columns=["answer"])
    assert len(found.train) + len(found.held_out) == 90 * 89
    assert found.train[0].text.startswith("<user>Which number is larger, ")


def test_a_mixture_tells_its_files_apart(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1 2", "answer": "x", "id": 7}\n{"prompt": "3 4", "answer": "y", "id": 8}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "5 6", "answer": "z", "id": 7}\n')
    files = {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}
    settings = MixtureData(files=files, id_column="id", source_weights={"b": 3.0}, held_out_fraction=0.0)
    found = load(settings, tokenizer, reward_columns=["answer"]).train
    assert [(prompt.id, prompt.source, prompt.columns["answer"]) for prompt in found] == [
        ("a:7", "a", "x"),
        ("a:8", "a", "y"),
        ("b:7", "b", "z"),
    ]


def test_a_mixture_leaves_columns_and_splits_by_question(tmp_path, tokenizer):
    rows = [{"prompt": f"{number % 15} + 1", "data_source": "openai/gsm8k", "answer": "x"} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text('{"question": "5 6", "answer": "z"}\n')
    files = {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}
    found = load(MixtureData(files=files, columns={"prompt": "question"}, held_out_fraction=0.3), tokenizer)
    train, held_out = ({prompt.text for prompt in part} for part in (found.train, found.held_out))
    assert held_out
    assert not train & held_out
    everything = [*found.train, *found.held_out]
    assert {(prompt.source, prompt.columns["data_source"]) for prompt in everything} == {("a", "openai/gsm8k"), ("b", "b")}
    assert {prompt.text for prompt in everything if prompt.source == "b"} == {"5 6"}  # of a column that a.jsonl does not have
    assert "there is no column uid; set data.id_column" in refused(
        MixtureData(files=files, columns={"prompt": "question"}, id_column="uid"), tokenizer
    )


def test_weights_are_of_sources_that_exist(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"data.source_weights.c: data.files has a. Correct the name"):
        MixtureData(files={"a": "a.jsonl"}, source_weights={"c": 1.0})
    with pytest.raises(ConfigError, match=r"data.source_weights: all rows are of one source"):
        JsonlData(path="a.jsonl", source_weights={"c": 1.0})
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "1 2", "of": "a"}\n')
    settings = JsonlData(path=str(file), source_column="of", source_weights={"c": 1.0}, held_out_fraction=0.0)
    with pytest.raises(ConfigError, match=r"data.source_weights.c: no prompt is of that source. The sources are a"):
        load(settings, tokenizer)
