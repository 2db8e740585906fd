"""A quantized GGUF file as a plain model folder, so that it can be trained in full.

The weights become bfloat16. A 4 or 5 bit weight is `scale * q + offset` with float16 scale and
offset; bfloat16 keeps 8 significant bits of the result, an error of at most 0.4 % of a weight, far
below the quantization's own, and it is the precision training runs in anyway.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from fulltune.assets.quiet import quiet_transformers
from fulltune.errors import MissingExtraError, ModelError


def dequantize_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the model, tokenizer and chat template of a GGUF file into a folder.

    Raises:
        MissingExtraError: the `gguf` or `accelerate` package is not installed.
        ModelError: the file is not GGUF, is cut short, or its architecture cannot be converted.
    """
    # transformers reads GGUF with the one and loads quantized models with the other.
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"reading `{gguf_file.name}` needs the package `{missing[0]}`",
            hint="pip install 'fulltune[demo]'",
        )
    _check_complete(gguf_file)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf_file.parent,
                gguf_file=gguf_file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
        except (ValueError, NotImplementedError, KeyError) as error:
            raise ModelError(
                f"`{gguf_file}` cannot be converted: {error}",
                hint="transformers reads a limited list of GGUF architectures; "
                "use the model's original safetensors folder",
            ) from error
        # Some versions of transformers take the beginning token for the end token here.
        if isinstance(model.config.eos_token_id, int):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        # The weights are plain now, but transformers still marks the model as quantized and would
        # refuse to save it, or to train it after loading.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            if name in vars(model):
                delattr(model, name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # saved for the owner alone otherwise


def _check_complete(gguf_file: Path) -> None:
    """Fail on a file that is not GGUF or ends before its last tensor."""
    from gguf import GGUFReader

    if not gguf_file.stat().st_size:
        raise ModelError(f"`{gguf_file}` is empty", hint="download it again")
    try:
        reader = GGUFReader(gguf_file)
        end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        # A place that lies outside of the file is no reason that a user can read.
        is_plain = isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError)
        raise ModelError(
            f"`{gguf_file}` is not a readable GGUF file: "
            f"{error if is_plain else 'it is damaged or cut short'}",
            hint="download it again",
        ) from error
    if end == 0 or end > gguf_file.stat().st_size:
        raise ModelError(
            f"`{gguf_file}` is cut short: {gguf_file.stat().st_size:,} bytes of {int(end):,}",
            hint="download it again",
        )
