"""Checkpoint directories in the Hugging Face format: `config.json`, safetensors weights, tokenizer files.

Loading maps tensors by name alone, because `model.py` names its parameters as the checkpoints do. Anything in a configuration
that `model.py` does not compute is refused by the name of its field: it would load and silently be another model.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nano_atlas.distributed import full_parameters, rank
from nano_atlas.errors import UserError
from nano_atlas.model import Llama3RopeScaling, ModelConfig, Transformer
from nano_atlas.runs import atomic_directory, read_json, write_json
from nano_atlas.tokenizer import Tokenizer


class Family(NamedTuple):
    architecture: str
    defaults: dict[str, Any]  # of fields that are absent
    only: dict[str, tuple]  # fields that change the computation -> the values that `model.py` computes


OFF = (False, None)  # and 0, which equals False
# A bias of Llama, Mistral or Qwen3 would be on o_proj too. Qwen's window is off unless `use_sliding_window`.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", {}, {"attention_bias": OFF, "sliding_window": OFF}),
    "mistral": Family("MistralForCausalLM", {"sliding_window": 4096}, {"attention_bias": OFF, "sliding_window": OFF}),
    "qwen2": Family("Qwen2ForCausalLM", {}, {}),
    "qwen3": Family("Qwen3ForCausalLM", {"head_dim": 128}, {"attention_bias": OFF}),
}  # fmt: skip
ONLY = {  # the same of all families
    "hidden_act": ("silu", None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, None),
} | dict.fromkeys(
    ("mlp_bias", "quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale",
     "use_sliding_window", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok",
     "moe_intermediate_size"), OFF
)  # fmt: skip

# What a saved checkpoint may consist of, besides *.safetensors: a directory that holds anything else is not replaced.
CHECKPOINT_FILES = {
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Named = Iterable[tuple[str, Tensor]]


def config_from_dict(values: dict, source: str = "config.json") -> ModelConfig:
    """The hyper-parameters in a `config.json` of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Defaults of absent fields are those of transformers. Raises UserError naming the field that is missing or not supported.
    """

    def positive(field: str, default: int | None = None) -> int:
        value = default if values.get(field) is None else values[field]
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"{source}: {field} should be a positive integer, not {value!r}")
        return value

    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{source}: model_type={kind!r} is not supported; use one of {', '.join(FAMILIES)}")
    values = FAMILIES[kind].defaults | values
    for field, supported in {**ONLY, **FAMILIES[kind].only}.items():
        if values.get(field) not in supported:
            shown = " or ".join(map(repr, supported))
            raise UserError(f"{source}: {field}={values[field]!r} is not supported; only {shown} is")
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"{source}: layer_types may only contain full_attention, not {values['layer_types']}")

    heads = positive("num_attention_heads")
    defaults = {"head_dim": positive("hidden_size") // heads, "num_key_value_heads": heads}
    sizes = {f.name: positive(f.name, defaults.get(f.name)) for f in fields(ModelConfig) if f.type is int}
    if heads % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
        rule = "num_attention_heads must be a multiple of num_key_value_heads, and head_dim even"
        raise UserError(f"{source}: {rule}; they are {sizes}")
    theta, scaling = _rope(values, source)
    return ModelConfig(
        model_type=kind,
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        **sizes,
    )


def _rope(values: dict, source: str) -> tuple[float, Llama3RopeScaling | None]:
    """Base and scaling of the rotary embedding from either style of configuration, or from both if they agree."""
    rope = dict(values.get("rope_parameters") or {})
    old = {"rope_theta": values.get("rope_theta")} | (values.get("rope_scaling") or {})
    for field, value in old.items():
        if value is not None and rope.setdefault(field, value) != value:
            styles = "rope_parameters and rope_scaling or rope_theta"
            raise UserError(f"{source}: {styles} disagree on {field}; remove one of them")
    theta = float(rope.pop("rope_theta", 10_000.0))
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{source}: rope_type={rope_type!r} is not supported; use 'default' or 'llama3'")
    names = [field.name for field in fields(Llama3RopeScaling)]
    for field, value in rope.items():
        if field not in names and (field, value) != ("partial_rotary_factor", 1.0):
            raise UserError(f"{source}: {field}={value!r} in the rope parameters is not supported")
    if rope_type == "default":
        return theta, None
    if missing := [name for name in names if name not in rope]:
        raise UserError(f"{source}: rope_type 'llama3' needs {', '.join(missing)} in the rope parameters")
    return theta, Llama3RopeScaling(**{name: rope[name] for name in names})


def config_to_dict(config: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer | None = None) -> dict:
    """A `config.json` that transformers 4 and 5 and vLLM read: rope parameters and dtype are written in both styles."""
    values = asdict(config)
    del values["qk_norm"]  # follows from the model type
    if config.model_type in ("qwen2", "mistral"):
        del values["attention_bias"]  # likewise
    scaling = asdict(config.rope_scaling) | {"rope_type": "llama3"} if config.rope_scaling else None
    values["rope_scaling"] = scaling
    values["rope_parameters"] = (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    values |= {"architectures": [FAMILIES[config.model_type].architecture], "hidden_act": "silu"}
    values |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    values |= {"sliding_window": None, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        ends = list(tokenizer.eos_ids)
        values |= {"eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": tokenizer.pad_id}
    return values


def is_checkpoint(path: str | Path) -> bool:
    return (Path(path) / "config.json").is_file()


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint directory. Raises UserError."""
    if not is_checkpoint(path):
        raise UserError(f"{path} is not a checkpoint directory: it has no config.json")
    return config_from_dict(read_json(Path(path) / "config.json"), f"{path}/config.json")


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """A checkpoint directory as a model in `dtype` on `device`.

    Tensors are read one at a time from the mapped file straight into their place, so host memory holds the result and one tensor
    more. Raises UserError that names every missing, extra or wrongly shaped tensor.
    """
    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    found = _stored_tensors(path)
    problems = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in found]
    for name, (_, shape) in sorted(found.items()):
        if name == HEAD and config.tie_word_embeddings and EMBEDDING in found:  # some store it twice
            if not torch.equal(_read(found, HEAD), _read(found, EMBEDDING)):
                problems.append(f"{HEAD} differs from {EMBEDDING} although tie_word_embeddings is true")
        elif name not in shapes:
            problems.append(f"extra {name} {shape}")
        elif shape != shapes[name]:
            problems.append(f"{name} has shape {shape}, should have {shapes[name]}")
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"{path} does not fit its config.json ({len(problems)} problems):\n  {listed}")
    state = {}
    for name, shape in shapes.items():
        # `copy_` and not a view: the file may be replaced while the model lives, and training writes into its weights
        state[name] = torch.empty(shape, dtype=dtype, device=device).copy_(_read(found, name))
    model.load_state_dict(state, assign=True)
    return model


def _stored_tensors(path: Path) -> dict[str, tuple[Path, list[int]]]:
    """{name: (file, shape)} of one `model.safetensors`, or of the shards that the index names."""
    files, index = [path / "model.safetensors"], path / "model.safetensors.index.json"
    if not files[0].is_file() and not index.is_file():
        remedy = "pickled weights are not read, convert them"
        raise UserError(f"{path} has neither model.safetensors nor {index.name}; {remedy}")
    if not files[0].is_file():
        files = [path / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    remedy = "copy or download the checkpoint again"
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{index} names files that are not there: {', '.join(absent)}; {remedy}")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: (file, tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except SafetensorError as error:
            raise UserError(f"{file} is not a complete safetensors file ({error}); {remedy}") from error
    # old versions of transformers stored a buffer that means nothing
    return {name: stored for name, stored in found.items() if not name.endswith("rotary_emb.inv_freq")}


def _read(stored: dict[str, tuple[Path, list[int]]], name: str) -> Tensor:
    """A tensor as a view of the mapped file. The file is opened anew for each, so that its pages are let go with the tensor."""
    with safe_open(stored[name][0], framework="pt") as tensors:
        return tensors.get_tensor(name)


def with_tied_head(weights: Named, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The named weights of a model, and once more the embedding as lm_head.weight if the two are tied."""
    for name, weight in weights:
        yield name, weight
        if name == EMBEDDING and config.tie_word_embeddings:
            yield HEAD, weight.clone()  # a safetensors file must not hold the same memory twice


def in_shards(tensors: Named, max_bytes: float) -> Iterator[dict[str, Tensor]]:
    """The named tensors in host memory, in groups of at most `max_bytes` (a larger tensor alone), one file each."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_bytes:
            yield shard
            shard = {}
        shard[name] = tensor.cpu().contiguous()
    yield shard


def save_model(
    path: str | Path,
    model: Transformer,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    repeat_tied_head: bool = False,
) -> None:
    """Writes a directory that `load_model`, transformers and vLLM read, replacing an earlier checkpoint at `path` atomically.

    `dtype` converts the weights (default: as they are). Weights above `max_shard_bytes` are split into several files with an
    index. `repeat_tied_head` stores a tied head once more, under its own name. Collective; rank 0 writes. Raises UserError if
    `path` holds something else than a checkpoint, which would be lost.
    """
    path = Path(path)
    entries = path.iterdir() if path.is_dir() else filter(Path.exists, [path])
    foreign = [e.name for e in entries if e.suffix != ".safetensors" and e.name not in CHECKPOINT_FILES]
    if foreign:
        listed = ", ".join(sorted(foreign)[:5])
        raise UserError(f"{path} holds {listed}, which saving would delete; choose another directory")
    dtype = dtype or model.compute_dtype or model.head_weight.dtype
    tensors = full_parameters(model)
    if repeat_tied_head:
        tensors = with_tied_head(tensors, model.config)
    if rank() > 0:
        deque(tensors, maxlen=0)  # takes part in gathering
        return
    with atomic_directory(path) as folder:
        weight_map, total_bytes = {}, 0
        converted = ((name, tensor.to("cpu", dtype)) for name, tensor in tensors)
        for number, shard in enumerate(in_shards(converted, max_shard_bytes), start=1):
            file = f"model-{number:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            total_bytes += sum(tensor.nbytes for tensor in shard.values())
        if number == 1:
            (folder / file).rename(folder / "model.safetensors")
        else:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        if tokenizer is not None:
            tokenizer.save(folder)
        write_json(folder / "config.json", config_to_dict(model.config, dtype, tokenizer))
