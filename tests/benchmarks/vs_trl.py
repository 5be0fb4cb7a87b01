"""rlkit beside TRL's GRPOTrainer: the same model, prompts, group size, tokens and reward, in alternating runs.

    python tests/benchmarks/vs_trl.py N1 N4 S1 --rounds 2 --steps 12 --out vs_trl.json

N1: a 3.3 M Llama, float32, 4 prompts x 8 responses of 64 tokens.  N4: the same with exponential lengths, mean 40, at most 256.
S1: SmolLM2-135M, bfloat16, 1 x 8 responses of 48 tokens.  S1f: in float32, for processors
without AVX-512, whose products of bfloat16 matrices take a hundred times as long and would be all that is measured.
TRL generates with transformers, as it comes: its vLLM mode needs a GPU.

Every run is a process of its own. Reported is the median over steps from the third on of completion tokens per second of the whole
step, the median over rounds of that, and the ratio to TRL. The matrix product's rate is measured before every run; where it
varies by more than 25 % the machine was too busy, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ITEMS = {
    "N1": {"model": "nano", "dtype": "float32", "prompts": 4, "group": 8, "max_tokens": 64, "stops": 0, "rate": 1e-3},
    "N4": {"model": "nano", "dtype": "float32", "prompts": 4, "group": 8, "max_tokens": 256, "stops": 13, "rate": 1e-5},
    "S1": {"model": "smollm2_135m", "dtype": "bfloat16", "prompts": 1, "group": 8, "max_tokens": 48, "stops": 0, "rate": 1e-6},
    "S1f": {"model": "smollm2_135m", "dtype": "float32", "prompts": 1, "group": 8, "max_tokens": 48, "stops": 0, "rate": 1e-6},
}
SYSTEMS = {  # name -> rlkit's engine settings
    "trl": [],
    "rlkit-vllm": ["rollout=vllm"],
    "rlkit-vllm-compiled": ["rollout=vllm", "rollout.enforce_eager=false"],
    "rlkit-transformers": ["rollout=transformers"],
}
WARM_UP = 2  # steps
MAX_SPREAD = 0.25
REWARD = "def letter_a(prompts, completions, **columns):\n    return [c.count('a') / max(len(c), 1) for c in completions]\n"


def make_model(item: dict, folder: Path) -> str:
    """The item's model. EOS is practically never sampled, or, with `stops`, every one of so many ids ends a response: near
    the start the distribution is almost uniform over 512 tokens, so 13 of them make lengths exponential with a mean of 40.

    Never: every embedding has 1 as its first component, so that hidden states have, and EOS's has -1, which leaves it a
    probability of about 1e-7. (An id beyond the vocabulary is refused by vLLM.)"""
    if item["model"] != "nano":
        from rlkit.data.models.loading import resolve

        return resolve(item["model"])
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"<{i}>" for i in range(511 - len(alphabet))), "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<1>", unk_token="<0>", padding_side="left"
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    embedding = model.model.embed_tokens.weight.data
    embedding[:, 0] = 1.0
    embedding[names.index("<eos>"), 0] = -1.0
    stops = list(range(300, 300 + item["stops"])) or [names.index("<eos>")]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=fast.pad_token_id)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def prompts(item: dict) -> list[str]:
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]
    if item["model"] == "nano":
        return [f"say {words[i % 8]} {i:03d}" for i in range(512)]  # 13 bytes, more or less
    return [
        f"Here is the list number {i}: {words[i % 8]}, {words[i // 8 % 8]}. Repeat it, then go on with it as you like."
        for i in range(512)
    ]


def run_rlkit(item: dict, model: str, work: Path, steps: int, engine: list[str]) -> list[dict]:
    from rlkit import cli

    rows = [{"prompt": text} for text in prompts(item)]
    (work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "reward.py").write_text(REWARD)
    overrides = [
        f"model.path={model}",
        f"model.dtype={item['dtype']}",
        "data=jsonl",
        f"data.path={work / 'data.jsonl'}",
        f"reward.fn={work / 'reward.py'}:letter_a",
        *engine,
        "evaluation=none",
        f"run_dir={work / 'run'}",
        f"num_steps={steps}",
        f"prompts_per_step={item['prompts']}",
        f"group_size={item['group']}",
        "max_prompt_tokens=64",
        f"max_response_tokens={item['max_tokens']}",
        f"optimizer.learning_rate={item['rate']}",
        "aggregation=token_mean",
    ]
    if cli.guard(lambda: cli.dispatch(["train", "model=path", *overrides])):
        raise SystemExit("rlkit failed")
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "step_s": line["time/step_s"],
            "tokens": line["length/mean"] * item["prompts"] * item["group"],
            **{
                name: line[f"time/{name}_s"]
                for name in ("generate", "reward", "learn", "sync", "sync_check")
                if f"time/{name}_s" in line
            },
        }
        for line in lines
    ]


def run_trl(item: dict, model: str, work: Path, steps: int) -> list[dict]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    lengths: list[float] = []
    stops = set(range(300, 300 + item["stops"]))

    def letter_a(prompts, completions, completion_ids, **columns):
        ended = [next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids)) for ids in completion_ids]
        lengths.append(sum(ended))
        return [c.count("a") / max(len(c), 1) for c in completions]

    class Times(TrainerCallback):
        def __init__(self):
            self.began, self.seconds = 0.0, []

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.monotonic()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.monotonic() - self.began)

    times = Times()
    samples = item["prompts"] * item["group"]
    # Dataloading happens between two steps, generation inside the step: on_step_begin comes before both.
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=letter_a,
        args=GRPOConfig(
            output_dir=str(work / "trl"),
            per_device_train_batch_size=samples,
            num_generations=item["group"],
            max_completion_length=item["max_tokens"],
            max_steps=steps,
            learning_rate=item["rate"],
            lr_scheduler_type="constant",
            beta=0.0,
            loss_type="dapo",
            temperature=1.0,
            top_p=1.0,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=item["dtype"] == "bfloat16",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            model_init_kwargs={"dtype": item["dtype"]},
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts(item)}),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        callbacks=[times],
    )
    trainer.train()
    return [{"step_s": seconds, "tokens": tokens} for seconds, tokens in zip(times.seconds, lengths, strict=True)]


def matrix_rate() -> float:
    """GFLOP/s of a float32 product on all cores: the best of a few, which is what the machine can do at the moment."""
    import torch

    x = torch.randn(1024, 1024)
    best = 0.0
    for _ in range(8):
        began = time.monotonic()
        torch.mm(x, x)
        best = max(best, 2 * 1024**3 / (time.monotonic() - began) / 1e9)
    return best


def child(arguments: argparse.Namespace) -> None:
    item = ITEMS[arguments.items[0]]
    rate = matrix_rate()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = make_model(item, work / "model")
        if arguments.system == "trl":
            steps = run_trl(item, model, work, arguments.steps)
        else:
            steps = run_rlkit(item, model, work, arguments.steps, SYSTEMS[arguments.system])
    Path(arguments.out).write_text(json.dumps({"gflops": rate, "steps": steps}))


def summarise(runs: list[dict]) -> dict[str, float]:
    """Medians over a system's runs."""
    per_run = []
    for run in runs:
        kept = run["steps"][WARM_UP:]
        medians = {name: statistics.median(step[name] for step in kept) for name in kept[0]}
        medians["tokens_per_s"] = sum(step["tokens"] for step in kept) / sum(step["step_s"] for step in kept)
        per_run.append(medians)
    return {name: round(statistics.median(each[name] for each in per_run), 4) for name in per_run[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="+", choices=list(ITEMS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--engines", nargs="+", choices=list(SYSTEMS)[1:], default=list(SYSTEMS)[1:], help="beside TRL")
    parser.add_argument("--out", default="vs_trl.json")
    parser.add_argument("--system", choices=list(SYSTEMS), help=argparse.SUPPRESS)  # one run, in a process of its own
    arguments = parser.parse_args()
    if arguments.system:
        child(arguments)
        return
    results: dict[str, dict] = {}
    for item in arguments.items:
        runs: dict[str, list[dict]] = {system: [] for system in ("trl", *arguments.engines)}
        for _ in range(arguments.rounds):
            for system in runs:
                with tempfile.NamedTemporaryFile(suffix=".json") as out:
                    command = [
                        sys.executable,
                        __file__,
                        item,
                        "--system",
                        system,
                        "--steps",
                        str(arguments.steps),
                        "--out",
                        out.name,
                    ]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(f"{item} {system}:\n{done.stderr[-3000:]}")
                    runs[system].append(json.loads(Path(out.name).read_text()))
        summary = {system: summarise(found) for system, found in runs.items()}
        rates = [run["gflops"] for found in runs.values() for run in found]
        spread = max(rates) / min(rates) - 1
        results[item] = {"systems": summary, "gflops": [round(rate) for rate in rates], "spread": round(spread, 3)}
        baseline = summary["trl"]["tokens_per_s"]
        print(f"{item}  (matrix rate {min(rates):.0f} to {max(rates):.0f} GFLOP/s{', TOO BUSY' if spread > MAX_SPREAD else ''})")
        for system, figures in summary.items():
            split = "  ".join(f"{name} {figures[name]:.3f}" for name in figures if name not in ("tokens", "tokens_per_s"))
            print(f"  {system:<20}{figures['tokens_per_s']:8.0f} tok/s  {figures['tokens_per_s'] / baseline:5.2f}x   {split}")
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
