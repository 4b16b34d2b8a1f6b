"""A checkpoint's tokenizer and chat template, with one guarantee more than usual: text never turns into control tokens.

Where messages hold no special token, `chat_ids` gives exactly the ids of transformers' `apply_chat_template`. Where they do (a
user who types `<|im_end|>`), that occurrence is encoded as the ordinary text it is, so nobody can close a turn from inside it.

Simplified against transformers: one template per tokenizer (the one named `default`), no tools, no multimodal messages.
"""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nano_atlas.errors import UserError
from nano_atlas.runs import read_json, write_json

# The format of OpenAI's ChatML as Qwen writes it, for checkpoints that come without a template.
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

PRIVATE_USE = range(
    0xF0000, 0xFFFFE
)  # code points without a meaning, which stand in for special tokens while rendering


class _Generation(Extension):
    """`{% generation %}` marks assistant text for loss masks in some templates; here the body is simply rendered."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


def _compile(template: str, source: str) -> jinja2.Template:
    """The environment of transformers' `apply_chat_template`: same block trimming, same filters and functions, sandboxed."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # jinja's own escapes HTML characters
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"{source}: the chat template is not valid jinja2, line {error.lineno}: {error.message}"
        ) from error


def _token_text(value: str | dict | None) -> str | None:
    """A token of tokenizer_config.json, which is written either as its text or as an AddedToken object."""
    return value.get("content") if isinstance(value, dict) else value


def _stored_template(path: Path, config: dict) -> str | None:
    """The template in a directory; a file of its own goes before the entry in tokenizer_config.json. Raises UserError."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if not isinstance(template, list):
        return template
    named = {entry["name"]: entry["template"] for entry in template}
    if "default" not in named:
        raise UserError(
            f"{path / 'tokenizer_config.json'} has chat templates {sorted(named)}, but none named 'default'"
        )
    return named["default"]


class Tokenizer:
    """Text and chats to ids and back.

    Made from a checkpoint directory by `from_directory`, or in memory from a `tokenizers.Tokenizer` whose special tokens are
    registered with it. `eos_ids` are all ids that end a generation (by default that of `eos_token`), `config` is the content of
    `tokenizer_config.json`, `source` the name that error messages use.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str = CHATML,
        eos_token: str | None = None,
        pad_token: str | None = None,
        *,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        config: dict | None = None,
        source: str = "tokenizer",
    ):
        self.backend = backend
        backend.no_truncation()  # some tokenizer.json files carry the settings of a training run
        backend.no_padding()
        self._lock = threading.Lock()  # around `encode_special_tokens`, which is a state of the backend
        self.source = source
        self.chat_template = chat_template
        self._template = _compile(chat_template, source)
        self.config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        } | (config or {})
        self.config |= {
            key: token for key, token in (("eos_token", eos_token), ("pad_token", pad_token)) if token
        }
        self.eos_ids = tuple(eos_ids) or (self._id_of(eos_token, "eos_token"),)
        self.pad_id = pad_id
        if pad_id is None:
            self.pad_id = self.eos_ids[0] if pad_token is None else self._id_of(pad_token, "pad_token")

        special = {
            token.content: index
            for index, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        for index in set(self.eos_ids) - set(
            special.values()
        ):  # stored as an ordinary token, yet it ends a text
            token = backend.id_to_token(index)
            if token is None:
                raise UserError(f"{source}: the end-of-sequence id {index} is not in the vocabulary")
            backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
            special[token] = index
        self._special_ids = frozenset(special.values())
        self._special = re.compile(
            f"({'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))})"
        )  # longest first

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json` and, where present, `tokenizer_config.json`, `chat_template.jinja`, and the ids that end a
        generation or pad in `generation_config.json` or else `config.json`. Raises UserError naming the file at fault.
        """
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise UserError(
                f"{path} has no tokenizer.json; transformers' AutoTokenizer(...).save_pretrained(...) writes one"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path / 'tokenizer.json'} cannot be read: {error}") from error
        config = read_json(path / "tokenizer_config.json")
        settings = [read_json(path / name) for name in ("generation_config.json", "config.json")]

        def token_id(name: str) -> int | list[int] | None:
            named = (
                file[f"{name}_token_id"] for file in settings if file.get(f"{name}_token_id") is not None
            )
            token = _token_text(config.get(f"{name}_token"))
            return next(named, None if token is None else backend.token_to_id(token))

        eos_ids = token_id("eos")
        eos_ids = list(eos_ids) if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids]
        template = _stored_template(path, config)
        if template is None:
            template, end_of_turn = CHATML, backend.token_to_id("<|im_end|>")
            if end_of_turn is None and eos_ids:
                template = CHATML.replace(
                    "<|im_end|>", backend.id_to_token(eos_ids[0])
                )  # the only end this model knows
            elif end_of_turn not in eos_ids:
                eos_ids.append(end_of_turn)
        if not eos_ids or None in eos_ids:
            raise UserError(
                f"{path} names no end-of-sequence token; add eos_token_id to its generation_config.json"
            )
        pad_id = token_id("pad")
        pad_id = eos_ids[0] if pad_id is None else pad_id
        return cls(backend, template, eos_ids=eos_ids, pad_id=pad_id, config=config, source=str(path))

    def save(self, path: str | Path) -> None:
        """Writes what `from_directory`, transformers and vLLM read: tokenizer.json, tokenizer_config.json, chat_template.jinja
        and, because it is the one place for all the ends of a generation, generation_config.json.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(path / "tokenizer.json"))
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        write_json(path / "tokenizer_config.json", config)
        write_json(path / "generation_config.json", {"eos_token_id": eos, "pad_token_id": self.pad_id})
        (path / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included; a model's embedding may have more rows, never fewer."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no token is added, and special tokens that occur in it stay text."""
        ids = self._encode(text, specials_are_text=True)
        if not self._special_ids.isdisjoint(ids):
            raise UserError(
                f"{self.source}: this vocabulary spells a special token out of ordinary text, in {text[:200]!r}"
            )
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def chat_ids(
        self, messages: Sequence[dict], add_generation_prompt: bool = True, **template_kwargs
    ) -> list[int]:
        """Ids of a chat in the checkpoint's format.

        `messages` are `{"role": ..., "content": ...}`; `template_kwargs` go to the template (Qwen3: `enable_thinking=False`).
        Raises UserError where the template refuses the messages.
        """
        text, special_of = self._render(messages, add_generation_prompt, template_kwargs)
        if not special_of:
            return self._encode(text, specials_are_text=False)
        ids, run = [], ""
        for piece in self._special.split(text):  # text, control token, text, ..., text
            if special_of.keys().isdisjoint(piece):
                run += piece
                continue
            ids += self._encode(run, specials_are_text=False)
            plain = "".join(special_of.get(character, character) for character in piece)
            ids += self._encode_after(plain) if ids else self.encode(plain)
            run = ""
        return ids + self._encode(run, specials_are_text=False)

    def _encode(self, text: str, specials_are_text: bool) -> list[int]:
        with self._lock:
            self.backend.encode_special_tokens = specials_are_text
            return self.backend.encode(text, add_special_tokens=False).ids

    def _encode_after(self, text: str) -> list[int]:
        """Ids of plain text that follows something: SentencePiece-like tokenizers put a space before a beginning."""
        newline, ids = self.encode("\n"), self.encode("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self.encode(text)

    def _render(
        self, messages: Sequence[dict], add_generation_prompt: bool, kwargs: dict
    ) -> tuple[str, dict[str, str]]:
        """The chat as text in which a private-use character stands for each special token of the input: {character: token}."""
        character_of: dict[str, str] = {}

        def free_characters() -> Iterator[str]:  # looked for where one is needed, which is seldom
            taken = set(json.dumps([list(messages), kwargs], ensure_ascii=False, default=str)) | set(
                self.chat_template
            )
            yield from (chr(code) for code in PRIVATE_USE if chr(code) not in taken)

        free = free_characters()

        def stand_in(match: re.Match) -> str:
            if match[0] not in character_of:
                character_of[match[0]] = next(free)
            return character_of[match[0]]

        def neutral(value):
            if isinstance(value, str):
                return self._special.sub(stand_in, value)
            if isinstance(value, dict):
                return {key: neutral(item) for key, item in value.items()}
            return [neutral(item) for item in value] if isinstance(value, list | tuple) else value

        named = (f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
        variables = {key: _token_text(self.config[key]) for key in named if self.config.get(key) is not None}
        variables |= {
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **neutral(kwargs),
        }
        try:
            text = self._template.render(messages=neutral(messages), **variables)
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(
                f"{self.source}: the chat template cannot render these messages: {error}"
            ) from error
        return text, {character: token for token, character in character_of.items()}

    def _id_of(self, token: str | None, name: str) -> int:
        index = None if token is None else self.backend.token_to_id(token)
        if index is None:
            raise UserError(f"{self.source}: {name} {token!r} is not in the vocabulary")
        return index
