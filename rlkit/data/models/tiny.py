"""The tiny model: a Llama of 0.8 M parameters over characters, warm-started on the `expressions` task.

It ships inside the package; `build` makes the same bytes again.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlkit.data import expressions
from rlkit.data.models.randomness import own_randomness
from rlkit.errors import DataError

SHIPPED = Path(__file__).with_name("tiny")

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
ALPHABET = "0123456789 =:+-"

# These leave pass@1 at 0.26 and pass@16 at 0.95 on all held-out prompts: room to learn, and something to lose.
STEPS = 700
BATCH_SIZE = 192
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
SOFTENING = 2.0  # the warm start's logits are divided by it; without it pass@1 is 0.50
IGNORED = -100  # label of a token that is not learnt, as in torch's cross entropy
DECAY_FRACTION = 0.2  # a decay that starts at a third keeps the model from ever finding the task


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of ALPHABET; anything else is UNK. Encoding puts BOS first, nothing adds EOS."""
    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, UNK, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # the default puts a space between two tokens
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        padding_side="left",
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The ids of BOS, EOS and PAD under the names that transformers' configurations give them."""
    names = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Heads of 32, which vLLM's attention takes on CPUs and GPUs alike."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **special_ids(tokenizer),
        dtype="float32",
    )


def build(out_dir: str | Path, seed: int = 0, *, steps: int = STEPS, num_threads: int = 2) -> Path:
    """Train the warm start and write it to the new folder `out_dir` in bf16, with its tokenizer. Returns the folder.

    The same seed, steps and number of threads give the same bytes on the same kind of processor; others round otherwise.
    Appears at once when it is whole. Raises DataError when `out_dir` exists.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise DataError(f"model build tiny: {out_dir} exists already. Remove it or choose another folder.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with own_randomness(num_threads), TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as work:
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        model = LlamaForCausalLM(make_config(tokenizer))
        _train(model, tokenizer, seed, steps, Path(work, "trainer"))
        with torch.no_grad():
            # A model that knows more than it shows, as pretrained ones do: there is something to learn within minutes, and
            # diversity to lose. The final norm scales the logits, so this is a temperature baked into the weights.
            model.model.norm.weight.div_(SOFTENING)
        model.bfloat16()
        model.config.use_cache = True  # the trainer switches it off and would save that
        model.generation_config = GenerationConfig(
            do_sample=True,
            **special_ids(tokenizer),
        )
        whole = Path(work, "model")
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        for file in whole.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner only, which would travel into the wheel
        shutil.move(whole, out_dir)
    return out_dir


def _train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, work: Path) -> None:
    # Every example is fresh: the model meets few problems twice in the same words, so it learns the rule, not the list.
    pairs = [expressions.example(seed, index) for index in range(steps * BATCH_SIZE)]
    texts = [row["prompt"] + answer for row, answer in pairs]
    ids = [[*text_ids, tokenizer.eos_token_id] for text_ids in tokenizer(texts)["input_ids"]]  # pyright: ignore[reportGeneralTypeIssues]
    # One token a character, after BOS. The trainer's own preparation does the same row by row, and takes longer than training.
    starts = [1 + len(row["prompt"]) for row, _ in pairs]
    labels = [[IGNORED] * start + row_ids[start:] for start, row_ids in zip(starts, ids, strict=True)]
    examples = Dataset.from_dict({"input_ids": ids, "labels": labels})
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(work),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": int(DECAY_FRACTION * steps), "decay_type": "linear"},
            warmup_steps=min(WARMUP_STEPS, steps // 10),
            adam_beta2=0.98,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=examples,
        processing_class=tokenizer,
    )
    trainer.train()
