"""CRMArena-Pro: questions about customer data. The student may query Salesforce before it answers.

    pip install simple-salesforce
    export SALESFORCE_USERNAME=... SALESFORCE_PASSWORD=... SALESFORCE_SECURITY_TOKEN=...
    python eval.py --preset own --bench crmarena --data b2b.jsonl --student URL --teacher grpo=URL --out runs/crm

**Not yet run against the live organisation**, only on a synthetic fixture. --data has records of the published data set.
Simplified: answers are in <solution> (published: gpt-4o extracts them); only exact matching; no simulated user.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nano_atlas.answers import visible
from nano_atlas.benches.arms import STUDENT
from nano_atlas.data import Problem
from nano_atlas.errors import UserError, say
from nano_atlas.runs import read_jsonl
from nano_atlas.schedule import Call, Script, ask, caught, play
from nano_atlas.seats import Answers, Fault, Question, Reply, Seat, in_groups
from nano_atlas.text import clean, masked

TURNS = 20  # queries and the answer, as in the original
SHOWN_CHARACTERS = 4000  # of a query's result
FIELDS = "idx", "task", "query", "reward_metric", "answer"  # of a task
ACCOUNT = {name: f"SALESFORCE_{name.upper()}" for name in ("username", "password", "security_token")}
INSTRUCTION = (
    "You can look things up in Salesforce: write <execute>a SOQL or SOSL query</execute> and wait for its rows. "
    "The answer is one id or name, several separated by commas, or None if there is none."
)
Query = Callable[[str], str]  # SOQL or SOSL -> "Rows: ..." or "Error: ..."


def load_tasks(path: Path, limit: int | None) -> dict[str, list[Problem]]:
    """By kind of task, its first `limit` problems with an exact answer. Raises UserError naming file and line."""
    kinds: dict[str, list[Problem]] = {}
    left_out, lines = 0, {}
    for number, record in read_jsonl(path):
        types = [type(record.get(name)) for name in ("task", "query", "answer")]
        if types != [str, str, list] or not record.keys() >= set(FIELDS):
            raise UserError(f"{path}:{number}: needs the fields {', '.join(FIELDS)} (a list)")
        if record["reward_metric"] != "exact_match":
            left_out += 1
            continue
        metadata = record["metadata"] if isinstance(record.get("metadata"), dict) else {}
        given = str(metadata.get("required") or ""), record["query"], INSTRUCTION
        question, gold = "\n\n".join(filter(None, given)), ", ".join(map(str, record["answer"]))
        name, kind = f"{record['task']}:{record['idx']}", record["task"]
        if (first := lines.setdefault(name, number)) != number:
            raise UserError(f"{path}:{number}: line {first} also has task and idx {name}; remove one")
        kinds.setdefault(kind, []).append(Problem(name, question, gold, kind))
    if not kinds:
        raise UserError(f"{path}: no task with reward_metric exact_match")
    say(f"{path}: left out {left_out} tasks that are scored by fuzzy matching or by a language model")
    return {kind: problems[:limit] for kind, problems in kinds.items()}


def verify(question: str, answer: str | None, text: str, gold: str) -> bool:
    """Whether both list the same items, ignoring order, case, quotes and brackets."""
    if answer is None:
        return False
    given, wanted = (re.split(r"[,;\n]", side.strip(" .[]").casefold()) for side in (answer, gold))
    return {item.strip(" .'\"") for item in given} - {""} == {item.strip(" .'\"") for item in wanted} - {""}


class QueryingSeat:
    """A student that may query before it answers. Its last reply counts, with the tokens of all turns."""

    def __init__(self, seat: Seat, query: Query):
        self.seat, self.query, self.count_tokens = seat, query, seat.count_tokens

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> Answers:
        """All conversations run in lockstep, so each turn is one batched call."""
        scripts = [caught(self.converse(q, q.seed + sample)) for q in questions for sample in range(q.n)]
        return in_groups(play(scripts, {STUDENT: self.seat}, progress), questions)

    def converse(self, question: Question, seed: int) -> Script:
        messages, tokens = question.messages, 0
        for turn in range(TURNS):
            call = Call(STUDENT, "turn", messages, question.generation, seed + turn * 1_000_003)
            ((reply,),) = yield from ask(call)
            tokens += reply.tokens
            thought, begin, rest = visible(reply.text).partition("<execute>")
            query, end, _ = rest.partition("</execute>")  # the rest are invented rows
            if not end:
                break
            said = {"role": "assistant", "content": thought + begin + query + end}
            told = clean(self.query(query.strip()))
            told = told[:SHOWN_CHARACTERS] + " ... (more)" * (len(told) > SHOWN_CHARACTERS)
            messages = [*messages, said, {"role": "user", "content": told}]
        return Reply(reply.text, tokens, reply.is_truncated)


def salesforce() -> Query:
    """Queries the user's organisation. Raises UserError naming what is missing."""
    if missing := [name for name in ACCOUNT.values() if not os.environ.get(name)]:
        raise UserError(f"--bench crmarena needs a Salesforce account; set {', '.join(missing)}")
    try:
        from simple_salesforce import Salesforce, exceptions
    except ImportError:
        raise UserError("--bench crmarena needs a package: pip install simple-salesforce") from None
    remedy = f"check {', '.join(ACCOUNT.values())} and the network"
    try:
        organisation = Salesforce(**{name: os.environ[variable] for name, variable in ACCOUNT.items()})
    except (exceptions.SalesforceError, OSError) as error:  # errors of `requests` are OSErrors
        raise UserError(masked(f"no Salesforce login ({type(error).__name__}: {error}); {remedy}")) from None

    def query(text: str) -> str:
        is_sosl = text.upper().startswith("FIND")
        try:
            found = organisation.search(text) if is_sosl else organisation.query_all(text)
        except exceptions.SalesforceError as error:
            return f"Error: {error.content}"
        except OSError as error:
            raise Fault(masked(f"Salesforce does not answer ({error}); {remedy}")) from None
        rows = found["searchRecords" if is_sosl else "records"]
        return "Rows: " + json.dumps([{k: row[k] for k in row if k != "attributes"} for row in rows])

    return query
