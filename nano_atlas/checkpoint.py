"""Checkpoint directories in the Hugging Face format: `config.json`, safetensors weights, tokenizer files.

Loading maps tensors by name alone, because `model.py` names its parameters as the checkpoints do. Anything in a configuration
that `model.py` does not compute is refused by the name of its field, because it would load and silently be another model.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nano_atlas.distributed import full_parameters, rank
from nano_atlas.errors import UserError
from nano_atlas.model import Llama3RopeScaling, ModelConfig, Transformer
from nano_atlas.runs import atomic_directory, read_json, write_json
from nano_atlas.tokenizer import Tokenizer

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What a saved checkpoint may consist of, besides *.safetensors: a directory that holds anything else is not replaced.
CHECKPOINT_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
}

# Fields that change the computation, with the values under which `model.py` computes the same; None is absence.
ONLY_SUPPORTED = {
    "hidden_act": ("silu", None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None,),
    "use_sliding_window": (False, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "n_routed_experts": (0, None),
    "num_experts_per_tok": (0, None),
    "moe_intermediate_size": (0, None),
}

EMBEDDING = "model.embed_tokens.weight"

ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | {
    field.name for field in fields(Llama3RopeScaling)
}


def config_from_dict(values: dict, source: str = "config.json") -> ModelConfig:
    """The hyper-parameters in a `config.json` of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Defaults of absent fields are those of transformers. Raises UserError naming the field that is missing or not supported.
    """

    def refuse(field: str, value: object, remedy: str) -> UserError:
        return UserError(f"{source}: {field}={value!r} is not supported; {remedy}")

    def positive(field: str, default: int | None = None) -> int:
        value = values.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"{source}: {field} should be a positive integer, not {value!r}")
        return value

    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise refuse("model_type", kind, f"use one of {', '.join(ARCHITECTURES)}")
    for field, supported in ONLY_SUPPORTED.items():
        if values.get(field) not in supported:
            raise refuse(field, values[field], f"only {' or '.join(repr(v) for v in supported)} is")
    if kind != "qwen2" and values.get("attention_bias"):
        raise refuse(
            "attention_bias",
            True,
            f"for {kind} it would put a bias on o_proj too; only Qwen2's biases are supported",
        )
    layer_types = values.get("layer_types") or []
    if set(layer_types) - {"full_attention"}:
        raise refuse("layer_types", sorted(set(layer_types)), "only full_attention is")
    window = values.get(
        "sliding_window", 4096 if kind == "mistral" else None
    )  # Mistral's default when the field is absent
    if window is not None and not kind.startswith(
        "qwen"
    ):  # Qwen's is off unless `use_sliding_window`, refused above
        raise refuse("sliding_window", window, "only null is (full attention)")

    heads, width = positive("num_attention_heads"), positive("hidden_size")
    head_dim = positive("head_dim", 128 if kind == "qwen3" else width // heads)
    kv_heads = positive("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(
            f"{source}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    if head_dim % 2:
        raise refuse("head_dim", head_dim, "rotary embeddings need an even one")
    theta, scaling = _rope(values, source)
    return ModelConfig(
        model_type=kind,
        vocab_size=positive("vocab_size"),
        hidden_size=width,
        intermediate_size=positive("intermediate_size"),
        num_hidden_layers=positive("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positive("max_position_embeddings"),
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def _rope(values: dict, source: str) -> tuple[float, Llama3RopeScaling | None]:
    """Base and scaling of the rotary embedding from either style of configuration, or from both where they agree."""
    old, new = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
    if values.get("rope_theta") is not None:
        old = {"rope_theta": values["rope_theta"]} | old
    for field in sorted(old.keys() & new.keys()):
        if old[field] != new[field]:
            raise UserError(
                f"{source}: rope_parameters and rope_scaling or rope_theta disagree on {field}; remove one of them"
            )
    rope = new | old
    unknown = sorted(rope.keys() - ROPE_KEYS)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(
            f"{source}: rope_type={rope_type!r} is not supported; only 'default' and 'llama3' are"
        )
    if unknown or rope.get("partial_rotary_factor", 1.0) != 1.0:
        field = unknown[0] if unknown else "partial_rotary_factor"
        raise UserError(f"{source}: {field}={rope[field]!r} in the rope parameters is not supported")
    theta = float(rope.get("rope_theta", 10_000.0))
    if rope_type == "default":
        return theta, None
    names = [field.name for field in fields(Llama3RopeScaling)]
    if missing := [name for name in names if name not in rope]:
        raise UserError(
            f"{source}: rope_type 'llama3' needs {', '.join(missing)} in rope_parameters or rope_scaling"
        )
    return theta, Llama3RopeScaling(**{name: rope[name] for name in names})


def config_to_dict(config: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer | None = None) -> dict:
    """A `config.json` that transformers 4 and 5 and vLLM read: the rope parameters are written in both styles."""
    values = asdict(config)
    del values["qk_norm"]  # follows from the model type
    if config.model_type in ("qwen2", "mistral"):
        del values["attention_bias"]  # likewise
    scaling = asdict(config.rope_scaling) | {"rope_type": "llama3"} if config.rope_scaling else None
    values["rope_scaling"] = scaling
    values["rope_parameters"] = (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    name = str(dtype).removeprefix("torch.")
    values |= {
        "architectures": [ARCHITECTURES[config.model_type]],
        "hidden_act": "silu",
        "dtype": name,
        "torch_dtype": name,
    }
    values |= {"sliding_window": None, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        ends = list(tokenizer.eos_ids)
        values |= {"eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": tokenizer.pad_id}
    return values


def is_checkpoint(path: str | Path) -> bool:
    return (Path(path) / "config.json").is_file()


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint directory. Raises UserError."""
    file = Path(path) / "config.json"
    if not is_checkpoint(path):
        raise UserError(f"{path} is not a checkpoint directory: it has no config.json")
    return config_from_dict(read_json(file), str(file))


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """A checkpoint directory as a model in `dtype` on `device`.

    Tensors are read one at a time from the mapped file straight into their place, so that host memory holds the result and one
    tensor more. Raises UserError that names every missing, extra or wrongly shaped tensor.
    """
    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    file_of, found = {}, {}
    for file in _weight_files(path):
        stored = _shapes_in(file)
        found |= stored
        file_of |= dict.fromkeys(stored, file)

    # Buffers that old versions of transformers stored, and the copy of the embedding that some tied checkpoints carry.
    extra = {name for name in found.keys() - shapes.keys() if not name.endswith("rotary_emb.inv_freq")}
    problems = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in found]
    wrong = [name for name, shape in shapes.items() if found.get(name, shape) != shape]
    problems += [f"{name} has shape {found[name]}, should have {shapes[name]}" for name in wrong]
    if config.tie_word_embeddings and "lm_head.weight" in extra and EMBEDDING in found:
        extra.remove("lm_head.weight")
        if not torch.equal(
            _read(file_of["lm_head.weight"], "lm_head.weight"), _read(file_of[EMBEDDING], EMBEDDING)
        ):
            problems.append(f"lm_head.weight differs from {EMBEDDING} although tie_word_embeddings is true")
    problems += [f"extra {name} {found[name]}" for name in sorted(extra)]
    if problems:
        raise UserError(
            f"{path} does not fit its config.json ({len(problems)} problems):\n  " + "\n  ".join(problems)
        )
    state = {}
    for name, shape in shapes.items():
        # `copy_` and not a view: the file may be replaced while the model lives, and training writes into its weights
        state[name] = torch.empty(shape, dtype=dtype, device=device).copy_(_read(file_of[name], name))
    model.load_state_dict(state, assign=True)
    return model


def _weight_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint: one `model.safetensors`, or the shards that the index names."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not index.is_file():
        raise UserError(
            f"{path} has neither model.safetensors nor {index.name}; pickled weights are not read, convert them"
        )
    files = [path / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{index} names files that are not there: {', '.join(absent)}; download the checkpoint again"
        )
    return files


def _shapes_in(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{file} is not a complete safetensors file ({error}); copy or download it again"
        ) from error


def _read(file: Path, name: str) -> torch.Tensor:
    """A tensor as a view of the mapped file. The file is opened anew for each, so that its pages are let go with the tensor."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def with_tied_head(
    weights: Iterable[tuple[str, torch.Tensor]], config: ModelConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """The named weights of a model, and once more the embedding as lm_head.weight where the two are tied."""
    for name, weight in weights:
        yield name, weight
        if name == EMBEDDING and config.tie_word_embeddings:
            yield "lm_head.weight", weight


def in_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: float
) -> Iterator[dict[str, torch.Tensor]]:
    """The named tensors in host memory, in groups of at most `max_bytes` (a larger tensor alone), one file each."""
    shard: dict[str, torch.Tensor] = {}
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
    index. `repeat_tied_head` stores a tied head once more, under its own name. All ranks call it, and rank 0 writes. Raises UserError
    where `path` holds something else than a checkpoint, which would be lost.
    """
    path = Path(path)
    entries = list(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    foreign = sorted(
        entry.name
        for entry in entries
        if entry.suffix != ".safetensors" and entry.name not in CHECKPOINT_FILES
    )
    if foreign:
        listed = ", ".join(foreign[:5])
        raise UserError(
            f"{path} holds {listed}, which saving a checkpoint would delete; choose another directory"
        )
    dtype = dtype or model.compute_dtype or model.head_weight.dtype
    parameters, tensors = model.named_parameters(), full_parameters(model)
    if repeat_tied_head:
        parameters, tensors = (with_tied_head(weights, model.config) for weights in (parameters, tensors))
    tensor_bytes = {name: parameter.numel() * dtype.itemsize for name, parameter in parameters}
    shards: list[list[str]] = [[]]
    for name, size in tensor_bytes.items():
        if shards[-1] and sum(tensor_bytes[other] for other in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)

    if rank() > 0:
        deque(tensors, maxlen=0)  # it takes part in gathering
        return
    with atomic_directory(path) as folder:
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{number:05}-of-{len(shards):05}.safetensors"
            )
            weight_map |= dict.fromkeys(names, file)
            run = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in islice(tensors, len(names))}
            if repeat_tied_head and "lm_head.weight" in run:
                run["lm_head.weight"] = run[
                    "lm_head.weight"
                ].clone()  # one file must not hold the same memory twice
            save_file(run, folder / file, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(tensor_bytes.values())}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        if tokenizer is not None:
            tokenizer.save(folder)
        write_json(folder / "config.json", config_to_dict(model.config, dtype, tokenizer))
