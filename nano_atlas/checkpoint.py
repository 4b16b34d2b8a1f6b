"""Checkpoint directories in the Hugging Face format: `config.json`, safetensors weights, tokenizer files.

Tensors are loaded by name, because `model.py` names its parameters as the checkpoints do. A configuration that
`model.py` does not compute is refused, naming the field: otherwise it would load and silently be another model.
"""

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nano_atlas.distributed import rank, settle_threads, shard, whole_parameters
from nano_atlas.errors import UserError
from nano_atlas.gpu import compile_layers
from nano_atlas.lora import ALPHA, adapt, merged
from nano_atlas.model import ModelConfig, Transformer
from nano_atlas.runs import atomic_directory, find_checkpoint, read_json, refuse_damage, write_json
from nano_atlas.text import number
from nano_atlas.tokenizer import Tokenizer

# Fields that change the computation -> the values that `model.py` computes. 0 equals False.
ONLY = {"hidden_act": ("silu", None), "layer_types": ("full_attention", None)}
ONLY |= {"pretraining_tp": (1, None), "partial_rotary_factor": (1.0, None)}
ONLY |= dict.fromkeys("""attention_bias mlp_bias quantization_config attn_logit_softcapping final_logit_softcapping logit_scale
    sliding_window use_sliding_window num_experts num_local_experts n_routed_experts num_experts_per_tok
    moe_intermediate_size""".split(), (False, None))  # fmt: skip
FAMILIES = {  # values of absent fields, and fields above that are ignored: Qwen2 always has biases
    "llama": ({}, ()),
    "mistral": ({"sliding_window": 4096}, ()),
    "qwen2": ({}, ("attention_bias", "sliding_window")),
    "qwen3": ({"head_dim": 128}, ("sliding_window",)),  # as in Qwen2, `use_sliding_window` switches it
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_TYPES = {"default": (), "llama3": LLAMA3_ROPE}  # -> parameters
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Named = Iterable[tuple[str, Tensor]]


def _positive(field: str, value, source: str, kind: type = int):
    """A positive number of this kind; it may be written as text. Raises UserError."""
    with suppress(ValueError):  # the same error as for a negative number
        found = number(value)
        if kind(found) == found and 0 < found < (2**31 if kind is int else float("inf")):
            return kind(found)
    what = "integer" if kind is int else "number"
    raise UserError(f"{source}: {field} should be a positive {what}, not {value!r:.60}")


def config_from_dict(values: dict, source: str = "config.json") -> ModelConfig:
    """The ModelConfig of a `config.json` of transformers 4 or 5. Raises UserError naming the field at fault."""
    kind, use = values.get("model_type"), ", ".join(FAMILIES)
    if kind not in [*FAMILIES]:
        raise UserError(f"{source}: model_type={kind!r:.60} is not supported; use one of {use}")
    defaults, ignored = FAMILIES[kind]
    values = {field: value for field, value in (defaults | values).items() if value is not None}
    for field in sorted(ONLY.keys() - ignored):
        found, supported = values.get(field), ONLY[field]
        if not all(value in supported for value in (found if isinstance(found, list) else [found])):
            raise UserError(f"{source}: {field}={found!r:.60} is not supported; only {supported[0]!r} is")
    heads, hidden = (_positive(f, values.get(f), source) for f in ("num_attention_heads", "hidden_size"))
    values = {"head_dim": hidden // heads, "num_key_value_heads": heads} | values
    names = [f.name for f in fields(ModelConfig) if f.type is int]
    config = {n: _positive(n, values.get(n, getattr(ModelConfig, n, None)), source) for n in names}
    if heads % config["num_key_value_heads"] or config["head_dim"] % 2:
        rule = "num_attention_heads must be a multiple of num_key_value_heads, and head_dim even"
        raise UserError(f"{source}: {rule}, not {config}")
    config |= {"attention_bias": kind == "qwen2", "qk_norm": kind == "qwen3"}
    config["rms_norm_eps"] = _positive("rms_norm_eps", values.get("rms_norm_eps", 1e-6), source, float)
    config["tie_word_embeddings"] = bool(values.get("tie_word_embeddings"))
    return ModelConfig(kind, **config, **_rope(values, source))


def _rope(values: dict, source: str) -> dict:
    """From transformers 5's rope_parameters and transformers 4's two fields, which must agree. Raises UserError."""
    new, scaling = (values.get(field) or {} for field in ("rope_parameters", "rope_scaling"))
    if not isinstance(new, dict) or not isinstance(scaling, dict):
        raise UserError(f"{source}: rope_parameters and rope_scaling should be objects, {{...}}")
    old = {"rope_theta": values.get("rope_theta")} | scaling
    rope = {field: v for field, v in new.items() if v is not None}
    for field, value in old.items():
        if value is not None and rope.setdefault(field, value) != value:
            raise UserError(f"{source}: rope_parameters contradict {field}={value!r:.60}; remove one of them")
    theta, old_type = rope.pop("rope_theta", 10_000.0), rope.pop("type", "default")
    rope_type = rope.pop("rope_type", old_type)
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    if rope_type not in [*ROPE_TYPES] or rope.keys() != set(ROPE_TYPES[rope_type]):
        found = f"rope_type={rope_type!r:.60} with {sorted(rope)}"
        raise UserError(f"{source}: {found} is not supported; use default, or llama3 with {LLAMA3_ROPE}")
    kinds = {"original_max_position_embeddings": int}
    rope = {f: _positive(f, value, source, kinds.get(f, float)) for f, value in rope.items()}
    return {"rope_theta": _positive("rope_theta", theta, source, float), "rope_scaling": rope or None}


def config_to_dict(config: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer | None = None) -> dict:
    """A `config.json` for transformers 4 and 5 and vLLM: rope parameters and dtype are written in both styles."""
    values = asdict(config)
    del values["qk_norm"]  # follows from the model type
    if config.model_type in ("qwen2", "mistral"):
        del values["attention_bias"]  # follows from the model type
    scaling = config.rope_scaling and config.rope_scaling | {"rope_type": "llama3"}
    values["rope_scaling"] = scaling
    values["rope_parameters"] = (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    values |= {"architectures": [f"{config.model_type.title()}ForCausalLM"], "hidden_act": "silu"}
    values |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    values |= dict.fromkeys(("sliding_window", "bos_token_id", "eos_token_id", "pad_token_id"))
    return values | (tokenizer.generation_config() if tokenizer else {})


def is_checkpoint(path: str | Path) -> bool:
    return os.path.isfile(find_checkpoint(path) / "config.json")


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint directory. Raises UserError."""
    if not is_checkpoint(path):
        remedy = f"train one with train_sft.py, or fetch one: hf download {path} --local-dir {path}"
        raise UserError(f"no model at {path}, because it has no config.json; {remedy}")
    return config_from_dict(read_json(find_checkpoint(path) / "config.json"), f"{path}/config.json")


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    """A checkpoint directory as a `Transformer`. Peak host memory: the model and one tensor. Raises UserError."""
    place = find_checkpoint(path)
    refuse_damage(place)
    config = read_config(path)
    files, found = _stored_tensors(place)
    if config.num_hidden_layers > len(found):  # before building so many layers
        raise UserError(f"{path} does not fit its config.json, with {config.num_hidden_layers} layers")
    with torch.device("meta"):
        model = Transformer(config)
    if config.tie_word_embeddings and {HEAD, EMBEDDING} <= found.keys():  # some store it twice
        if not torch.equal(_read(files, HEAD), _read(files, EMBEDDING)):
            raise UserError(f"{path}: {HEAD} differs from {EMBEDDING} although tie_word_embeddings is true")
        del found[HEAD]
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    ours, theirs = dict.fromkeys(found, "absent") | shapes, dict.fromkeys(shapes, "missing") | found
    if wrong := [name for name in sorted(ours) if ours[name] != theirs[name]]:
        listed = "\n  ".join(f"{name}: {theirs[name]}, should be {ours[name]}" for name in wrong)
        raise UserError(f"{path} does not fit its config.json ({len(wrong)} problems):\n  {listed}")
    state = {}
    for name, shape in shapes.items():
        # a copy: the file may be replaced during the run, and training writes into the weights
        state[name] = torch.empty(shape, dtype=dtype, device=device).copy_(_read(files, name))
        if not torch.stack(state[name].aminmax()).isfinite().all():  # aminmax needs no temporary tensor
            cause = "the checkpoint is damaged or its training diverged"
            raise UserError(f"{path}: {name} contains NaN or infinity: {cause}")
    model.load_state_dict(state, assign=True)
    if torch.device(device).type == "cpu":
        settle_threads(sum(parameter.numel() for parameter in model.parameters()))
    return compile_layers(model)


def load_trainable(path: str | Path, config, device: str) -> Transformer:
    """The model to train, by a script's options: adapted, and sharded under torchrun. Raises UserError."""
    model = load_model(path, getattr(torch, config.dtype), device)
    model.recompute_activations = config.gradient_checkpointing
    adapt(model, config.lora_rank, config.seed)
    shard(model)
    return model


def _stored_tensors(path: Path) -> tuple[dict[str, Path], dict[str, list[int]]]:
    """File and shape of each tensor in `model.safetensors`, or in the shards that the index names."""
    names, index = {"model.safetensors"}, path / "model.safetensors.index.json"
    if not (path / "model.safetensors").is_file():
        weight_map = read_json(index).get("weight_map") or {}
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {""}
        if not all(re.fullmatch(r"[^/\\\0]+\.safetensors", name) for name in names):
            raise UserError(f"{index}: weight_map must give each tensor a file *.safetensors beside it")
    if not names:
        raise UserError(f"{path} has no model.safetensors and no index of one; convert pickled weights first")
    files, shapes = {}, {}
    for file in sorted(path / name for name in names):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    files[name], shapes[name] = file, part.get_shape()
                    if (dtype := part.get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                        raise UserError(f"{file}: {name} is {dtype}; quantized weights are not supported")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is not a complete safetensors file ({error}); copy it again") from error
    # old versions of transformers stored this buffer; it is not needed
    return files, {name: shape for name, shape in shapes.items() if not name.endswith("rotary_emb.inv_freq")}


def _read(files: dict[str, Path], name: str) -> Tensor:
    """A view of the mapped file. The file is opened for each tensor, so that its pages are freed with the tensor."""
    with safe_open(files[name], framework="pt") as tensors:
        return tensors.get_tensor(name)


def with_tied_head(weights: Named, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The named weights of a model; if head and embedding are tied, also a copy of the embedding as lm_head.weight."""
    for name, weight in weights:
        yield name, weight
        if name == EMBEDDING and config.tie_word_embeddings:
            yield HEAD, weight.clone()  # safetensors refuses tensors that share memory


def in_shards(tensors: Named, max_bytes: float) -> Iterator[dict[str, Tensor]]:
    """The named tensors in host memory, in groups of at most `max_bytes` (a larger tensor is alone)."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_bytes:
            yield shard
            shard = {}
        shard[name] = tensor.cpu().contiguous()
    yield shard


def save_model(path, model: Transformer, tokenizer, max_shard_bytes=5e9, repeat_tied_head=False, **about):
    """Writes a checkpoint, replacing an earlier one; collective. tokenizer may be None. about: for `atomic_directory`."""
    tensors = merged(whole_parameters(model))
    if repeat_tied_head:
        tensors = with_tied_head(tensors, model.config)
    if rank() > 0:
        deque(tensors, maxlen=0)  # takes part in gathering
        return
    with atomic_directory(path, **about) as folder:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(in_shards(tensors, max_shard_bytes), start=1):
            file = f"model-{number:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        if number == 1:
            (folder / file).rename(folder / "model.safetensors")
        else:
            write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        if tokenizer is not None:
            tokenizer.save(folder)
        dtype = model.compute_dtype or model.head_weight.dtype
        write_json(folder / "config.json", config_to_dict(model.config, dtype, tokenizer))


def save_adapter(path: Path, model: Transformer, start: Path | str) -> None:
    """Writes the adapters, if any, as PEFT and vLLM load them onto the checkpoint `start`. Collective."""
    adapters = whole_parameters(model, "lora_")
    tensors = {f"base_model.model.{name}.weight": tensor.cpu().contiguous() for name, tensor in adapters}
    if rank() > 0 or not tensors:
        return
    modules = sorted({name.split(".")[-3] for name in tensors})
    r = len(next(iter(tensors.values())))  # of the first A
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(start)}
    about |= {"r": r, "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none"}
    about |= {"target_modules": modules, "inference_mode": True}
    with atomic_directory(path) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", about)
