"""A checkpoint's tokenizer and chat template, with one extra guarantee: text never turns into control tokens.

If messages contain no special token, `chat_ids` gives exactly the ids of transformers' `apply_chat_template`.
A special token in a message (a user types `<|im_end|>`) is encoded as plain text, so it cannot end a turn.

Simpler than transformers: one template per tokenizer (the one named `default`), no tools, no multimodal messages.
"""

import json
import math
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nano_atlas.errors import UserError
from nano_atlas.runs import find_checkpoint, read_json, refuse, replace_text, write_json

# OpenAI's ChatML as Qwen writes it, for checkpoints without a template.
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points without a meaning; they stand in for special tokens
NAMED_TOKENS = {f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")}
LARGEST = 1_000_000  # power or repetition in a template
WORK, LINE = 100_000_000, 100  # characters that a template may make for a chat; what an executed line counts


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "+"))  # "+" is only counted, see `trace`

    def call_binop(self, context, operator: str, left, right):
        a, b = (len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right))
        if (operator == "*" and a * b > LARGEST) or (operator == "**" and math.pow(a, b) > LARGEST):
            raise OverflowError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


@contextmanager
def _refusing(source: str, work: float = math.inf) -> Iterator[None]:
    """A template is a program that may raise anything or run for ever: both become a UserError. work: see WORK."""
    before = sys.gettrace()

    def trace(frame, event, result):
        nonlocal work
        work -= LINE + (len(result) if isinstance(result, str | list) else 0)
        if work < 0:
            raise OverflowError("it computes or writes too much")
        return trace

    try:
        sys.settrace(before if work == math.inf else trace)  # of this thread
        yield
    except Exception as error:
        cause = f"{type(error).__name__} in line {getattr(error, 'lineno', '?')}: {error}"
        raise UserError(f"{source}: the chat template cannot render this chat: {cause}"[:600]) from error
    finally:
        sys.settrace(before)


def _compile(template: str, source: str) -> jinja2.Template:
    """In the environment of transformers' `apply_chat_template`, without numbers of nine digits: a width, or a count."""
    if re.search(r"\d{9}", template):
        raise UserError(f"{source}: the chat template has a number of nine or more digits; remove it")
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's own escapes HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    # `{% generation %}` marks assistant text for loss masks in some templates; here its body is just rendered.
    template = re.sub(r"({%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%})", r"\1with", template)
    with _refusing(source):
        return environment.from_string(template)


class Tokenizer:
    """Text and chats to ids and back. backend: a `tokenizers.Tokenizer` whose vocabulary has all special tokens.

    eos_ids: all ids that end a generation (default: that of `eos_token`). source: name for error messages.
    named: `eos_token` and `pad_token`; they become part of `config`, the tokenizer_config.json.
    """

    def __init__(self, backend, chat_template=CHATML, eos_ids=(), source="tokenizer", **named: str):
        self.backend, self.chat_template, self.source = backend, chat_template, source
        backend.no_truncation()  # some tokenizer.json files carry the settings of a training run
        backend.no_padding()
        self._lock = threading.Lock()  # around `encode_special_tokens`, which the backend stores
        self._template = _compile(chat_template, source)
        self.config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        self.config |= named
        for name, token in named.items():
            if backend.token_to_id(token) is None:
                raise UserError(f"{source}: {name} {token!r} is not in the vocabulary")
        self.eos_ids = tuple(eos_ids) or (backend.token_to_id(named["eos_token"]),)
        self.pad_id = backend.token_to_id(named["pad_token"]) if "pad_token" in named else self.eos_ids[0]
        added = backend.get_added_tokens_decoder()
        special = {token.content: index for index, token in added.items() if token.special}
        for index in set(self.eos_ids) - set(special.values()):  # ordinary tokens that end a text
            token = backend.id_to_token(index)
            if not token:
                raise UserError(f"{source}: the end-of-sequence id {index} is not in the vocabulary")
            backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
            special[token] = index
        unknown = getattr(backend.model, "unk_token", None) or ""  # not a control token
        self._special_ids = frozenset(special.values()) - {backend.token_to_id(unknown)}
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json` and, if present, the other files that transformers reads. Raises UserError."""
        path = find_checkpoint(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more specific
            remedy = f"`hf download {path} --local-dir {path}` or AutoTokenizer(...).save_pretrained(...)"
            raise UserError(f"{path}/tokenizer.json cannot be read ({error}); get one by {remedy}") from error
        names = ("generation_config.json", "config.json", "special_tokens_map.json", "tokenizer_config.json")
        *settings, special, config = (read_json(path / name) for name in names)
        if "added_tokens_decoder" not in config:  # transformers reads the map only beside older files
            config |= {name: special[name] for name in NAMED_TOKENS if special.get(name) is not None}
        for name in NAMED_TOKENS & config.keys():  # written as its text or as an AddedToken object
            if isinstance(config[name], dict):
                config[name] = config[name].get("content")
            if not isinstance(config[name], str | None):
                raise UserError(f"{path}: {name} must be a text, not {str(config[name])[:40]}")

        def token_ids(name: str) -> list[int]:
            places = [file.get(f"{name}_token_id") for file in settings]
            for ids in (*places, backend.token_to_id(config.get(f"{name}_token") or "")):
                ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
                if not all(type(i) in (int, str) and re.fullmatch(r"-?\d{1,9}", str(i)) for i in ids):
                    raise UserError(f"{path}: {name}_token_id must be an integer, not {str(ids)[:40]}")
                if found := [int(index) for index in ids if int(index) >= 0]:  # -1: none
                    return found
            return []

        eos_ids, template, file = token_ids("eos"), config.get("chat_template"), path / "chat_template.jinja"
        if isinstance(template, list):
            template = {str(e.get("name")): e.get("template") for e in template if isinstance(e, dict)}
        if isinstance(template, dict):
            template = template.get("default", template)
        if file.is_file():
            template = file.read_text("utf-8", errors="replace")
        if not isinstance(template, str | None):
            raise UserError(f"{path}: chat_template must be a text, or a list with one named 'default'")
        if template is None:
            template, end_of_turn = CHATML, backend.token_to_id("<|im_end|>")
            if end_of_turn is None and eos_ids:  # the only end token of this model
                template = CHATML.replace("<|im_end|>", backend.id_to_token(eos_ids[0]) or "")
            elif end_of_turn not in (None, *eos_ids):
                eos_ids = [*eos_ids, end_of_turn]
        if not eos_ids:
            raise UserError(f"{path} names no end-of-sequence token; add eos_token_id to its config.json")
        tokenizer = cls(backend, template, eos_ids=eos_ids, source=str(path))
        tokenizer.config |= config
        tokenizer.pad_id = (token_ids("pad") + eos_ids)[0]
        rows = settings[1].get("vocab_size")
        if re.fullmatch(r"\d{1,9}", str(rows)) and tokenizer.vocab_size > int(rows):
            cause = f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, its model's config.json only {rows}"
            raise UserError(f"{cause}; remove the added tokens, or resize_token_embeddings() in transformers")
        return tokenizer

    def save(self, path: Path) -> None:
        """Writes what `from_directory`, transformers and vLLM read; generation_config.json may hold several ends."""
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        write_json(path / "tokenizer_config.json", config)  # makes the directory
        write_json(path / "generation_config.json", self.generation_config())
        replace_text(path / "chat_template.jinja", self.chat_template)
        self.backend.save(str(path / "tokenizer.json"))

    def generation_config(self) -> dict:
        """The fields of generation_config.json; `config.json` has them too."""
        ends = list(self.eos_ids)
        return {"eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": self.pad_id}

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included; a model's embedding may have more rows, never fewer."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no token is added, and special tokens in it are encoded as text."""
        ids = self._encode(text, specials_are_text=True)
        if not self._special_ids.isdisjoint(ids):
            raise UserError(f"{self.source}: the plain text {text[:200]!r} is encoded as a special token")
        return ids

    def spells_control_token(self, text: str) -> bool:
        return self._special.search(text) is not None

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def chat_ids(self, messages: Sequence[dict], add_generation_prompt: bool = True, **options) -> list[int]:
        """Ids of a chat [{"role", "content"}, ...]. options: for the template (enable_thinking). Raises UserError."""
        text, token_of = self._render(messages, add_generation_prompt, options)
        pieces = self._special.split(text)  # text, control token, text, ...
        for is_every_text_apart in (False, True):
            ids, run = [], ""
            for index, piece in enumerate(pieces):
                plain = piece.translate(token_of)
                if index % 2 or plain == piece and not is_every_text_apart:
                    run += piece
                    continue
                ids += self._encode(run, specials_are_text=False)
                # SentencePiece-like tokenizers add a space at the start of a text, so encode the rest behind a newline
                newline, after = self.encode("\n"), self.encode("\n" + plain)
                is_split = ids and after[: len(newline)] == newline
                ids += after[len(newline) :] if is_split else self.encode(plain)
                run = ""
            ids += self._encode(run, specials_are_text=False)
            if sum(index in self._special_ids for index in ids) <= len(pieces) // 2:
                break  # else a normalizer turned other spellings into control tokens
        return ids

    def _encode(self, text: str, specials_are_text: bool) -> list[int]:
        with self._lock:
            self.backend.encode_special_tokens = specials_are_text
            try:
                return self.backend.encode(text, add_special_tokens=False).ids
            except Exception as error:  # the library raises nothing more specific
                raise UserError(f"{self.source}: {text[:80]!r} cannot be encoded: {error}") from error

    def _render(self, messages: Sequence[dict], add_generation_prompt, options) -> tuple[str, dict[int, str]]:
        """The chat as text, and {private-use code point: the special token of the input that it replaces}."""

        def neutral(value):
            if isinstance(value, str):
                return self._special.sub(lambda match: character_of[match[0]], value)
            if isinstance(value, dict):
                return {key: neutral(item) for key, item in value.items()}
            return [neutral(item) for item in value] if isinstance(value, list | tuple) else value

        variables = {name: self.config[name] for name in NAMED_TOKENS if self.config.get(name) is not None}
        variables |= {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        with _refusing(self.source, WORK):
            given = json.dumps([*messages, options], ensure_ascii=False, default=str) + self.chat_template
            free = (character for character in map(chr, PRIVATE_USE) if character not in given)
            character_of = defaultdict(lambda: next(free))
            text = self._template.render(messages=neutral(messages), **variables | neutral(options))
        return text, {ord(character): token for token, character in character_of.items()}
