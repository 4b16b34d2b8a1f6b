"""τ²-bench from end to end with a model that knows one policy whose score is known: it is taught here, and served by vLLM.

    export TAU2_DATA_DIR=.../tau2-bench/data
    python -m benchmarks.tau2_rehearsal                       # transfer every customer; student, user and teacher on one server
    python -m benchmarks.tau2_rehearsal --mode solo           # the same from the ticket
    python -m benchmarks.tau2_rehearsal --python .venv-tau2/bin/python        # where tau2 is in an environment of its own

`train_sft.py` teaches a newborn of 0.7M parameters conversations in which the agent transfers and the user hangs up (some ten minutes
on two cores); then `eval.py --bench tau2` does all tasks of the split, alone and taught. Both arms must score what the floor "always
transfer" does: 17.54 % on telecom base.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from benchmarks.pretrain import initialize
from nano_atlas import protocol
from nano_atlas.checkpoint import is_checkpoint, save_model
from nano_atlas.config import option, parse, run_script
from nano_atlas.errors import UserError
from nano_atlas.model import ModelConfig, Transformer
from nano_atlas.runs import write_jsonl
from nano_atlas.tokenizer import Tokenizer
from nano_atlas.vllm.server import VllmServer

CHAT = """<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' else '' }}
{%- if tools %}
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}For a call write <tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}<|im_end|>
{% for message in messages if message.role != 'system' %}<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{% if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>{% else %}{{ message.content or '' }}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GREETING = "Hi! How can I help you today?"  # with which tau2's orchestrator begins
COMPLAINT, GOODBYE = "My phone has no service, please help.", "###TRANSFER###"
HOLD = "YOU ARE BEING TRANSFERRED TO A HUMAN AGENT. PLEASE HOLD ON."
CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
TRANSFER, DONE = CALL % ("transfer_to_human_agents", '{"summary": "No service."}'), CALL % ("done", "{}")
PARAMETERS = {"properties": {"summary": {"type": "string"}}}
TOOLS = ("get_customer_by_phone", "transfer_to_human_agents", "toggle_airplane_mode", "done")
SCHEMAS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in TOOLS]
OFFERED = "".join("\n" + json.dumps(schema) for schema in SCHEMAS)  # so ends a system prompt with tools
APPROACH = "I would look at the line first."
TEACHING = "<thinking>It is stuck.</thinking>\n<teaching>Transfer the customer to a human agent.</teaching>"
CONVERSATIONS, STEPS = 1200, 420  # to learn from; of learning them


@dataclass(frozen=True)
class Config:
    mode: str = option("user", "with a user, or alone from the ticket", ("user", "solo"))
    limit: int | None = option(None, "tasks (none: all of the split)", above=0)
    python: str = option(sys.executable, "interpreter of an environment with tau2")
    out: Path = option(Path("runs/tau2-rehearsal"), "directory of models and results")


def conversation(texts: str, is_solo: bool, draws: random.Random) -> list[dict[str, str]]:
    """One of the moments that a seat must know, after a system prompt of any length cut from the domain's texts."""
    length = int(2 ** draws.uniform(3, 15.3))
    start = draws.randrange(max(1, len(texts) - length))
    policy = texts[start : start + length] + draws.choice(["", OFFERED])
    question, kind = draws.choice([COMPLAINT, policy[:200]]), draws.randrange(6)
    system = {"role": "system", "content": policy}
    if kind == 0:
        request = protocol.teacher_messages(f"{policy}\n\nTools: a, b\n\nUser: {question}", APPROACH)
        return [*request, {"role": "assistant", "content": TEACHING}]
    if kind == 1:
        return [system, *protocol.probe_messages(question), {"role": "assistant", "content": APPROACH}]
    result = draws.choice(["Transfer successful", "{}", "Error: " + policy[:60]])
    transfer = [TRANSFER, f"<tool_response>{result}</tool_response>"]
    turns = [GREETING, COMPLAINT, *transfer, HOLD] if kind < 4 else [GREETING, COMPLAINT, HOLD, GOODBYE]
    turns = [*transfer, DONE] if is_solo else turns
    roles = ["assistant", "user"] if len(turns) % 2 else ["user", "assistant"]
    return [system, *({"role": role, "content": turn} for role, turn in zip(roles * 3, turns))]


def newborn(texts: Sequence[str]) -> tuple[Transformer, Tokenizer]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = ["<|pad|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8192, **settings))
    tokenizer = Tokenizer(backend, CHAT, eos_token="<|im_end|>", pad_token="<|pad|>")
    more = {"max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": True, "qk_norm": True}
    shape = ModelConfig("qwen3", tokenizer.vocab_size, 64, 192, 2, 2, 1, 32, **more)
    return initialize(Transformer(shape), 0), tokenizer


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    data = Path(os.environ.get("TAU2_DATA_DIR", "/nowhere"), "tau2")
    files = sorted([*data.glob("domains/telecom/*.md"), *data.glob("user_simulator/*.md")])
    if not files:
        raise UserError(
            "TAU2_DATA_DIR must name tau2's data; `eval.py --bench tau2 --dry-run` says how to get it"
        )
    texts, draws = "\n".join(file.read_text() for file in files), random.Random(0)
    place, root = config.out / config.mode, Path(__file__).parents[1]
    if not is_checkpoint(place / "init"):
        chats = [conversation(texts, config.mode == "solo", draws) for _ in range(CONVERSATIONS)]
        said = (turn["content"] for chat in chats[:200] for turn in chat)
        save_model(place / "init", *newborn([texts, *said]))
        write_jsonl(place / "chats.jsonl", [{"messages": chat} for chat in chats])
    files = f"--data {place}/chats.jsonl --model {place}/init --out {place}/sft"
    lengths = "--tokens-per-step 10000 --tokens-per-batch 10000 --max-length 10000"
    learning = f"--preset own --device cpu --lr 1e-2 --steps {STEPS} {lengths} {files}"
    subprocess.run([sys.executable, root / "train_sft.py", *learning.split()], check=True)
    options = "--enforce-eager --enable-auto-tool-choice --tool-call-parser hermes".split()
    with VllmServer((place / "sft/model").resolve(), place / "vllm.log", options=options) as server:
        user = "solo" if config.mode == "solo" else server.url
        seats = f"--user {user} --student {server.url} --teacher taught={server.url} --control none"
        lengths = "--max-steps 20 --answer-tokens 200 --teaching-tokens 64 --probe-tokens 32"
        run = (
            f"--limit {config.limit} --samples 1 --temperature 0 --workers 8 --restart --out {place}/results"
        )
        evaluation = f"--bench tau2 {seats} {lengths} {run}".split()
        subprocess.run([config.python, root / "eval.py", *evaluation], check=True)


if __name__ == "__main__":
    run_script(main)
