"""CRMArena-Pro: questions about a customer's data. The student may query Salesforce before it answers.

    pip install simple-salesforce
    export SALESFORCE_USERNAME=... SALESFORCE_PASSWORD=... SALESFORCE_SECURITY_TOKEN=...
    python eval.py --preset own --bench crmarena --data b2b.jsonl --student URL --teacher grpo=URL --out runs/crm

**This has not been run against the live organisation**: tasks and data are not free to ship (CC BY-NC 4.0), credentials change, and
the loop has been tested on a synthetic fixture only. A line of the tasks file is a record of the published data set, with idx,
task, query, answer (a list), metadata {required, optional} and reward_metric.

Simplified against the original: answers stand in <solution> instead of being extracted by gpt-4o, so figures are not those of
the official extractor; only tasks with exact matching are taken (no fuzzy matching, no language model as judge of privacy); no
simulated user.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean

from nano_atlas.answers import visible
from nano_atlas.benches import scores
from nano_atlas.benches.arms import ArmsConfig, TaskResult
from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.runs import read_jsonl
from nano_atlas.seats import Question, Reply, Seat

TURNS = 20  # queries and the answer, as in the original
SHOWN_CHARACTERS = 4000  # of a query's rows
VIOLATION = "policy_violation_identification"  # its gold answer is the violated article, or "None"
ACCOUNT = {name: f"SALESFORCE_{name.upper()}" for name in ("username", "password", "security_token")}
INSTRUCTION = (
    "You can look things up in Salesforce: write <execute>a SOQL or SOSL query</execute> and wait for its rows. "
    "The answer is one id or name, several separated by commas, or None if there is none."
)

Query = Callable[[str], tuple[str, bool]]  # SOQL -> (rows as text, True) or (what was wrong, False)


def load_tasks(path: Path, limit: int | None) -> dict[str, list[Problem]]:
    """Problems with an exact answer by kind of task, the first `limit` of each. Raises UserError naming file and line."""
    kinds: dict[str, list[Problem]] = {}
    left_out = 0
    for number, record in read_jsonl(path):
        missing = {"idx", "task", "query", "answer", "reward_metric"} - set(record)
        if missing or not isinstance(record["answer"], list):
            wanted = ", ".join(sorted(missing)) or "a list as answer"
            raise UserError(f"{path}:{number}: not a CRMArena-Pro record; it needs {wanted}")
        if record["reward_metric"] != "exact_match":
            left_out += 1
            continue
        context = (record.get("metadata") or {}).get("required")
        question = "\n\n".join(str(part) for part in (context, record["query"], INSTRUCTION) if part)
        gold, kind = ", ".join(map(str, record["answer"])), record["task"]
        kinds.setdefault(kind, []).append(Problem(f"{kind}:{record['idx']}", question, gold, kind))
    if not kinds:
        raise UserError(f"{path}: none of its {left_out} tasks is scored by exact_match")
    print(f"{path}: {left_out} tasks left out, which are scored by fuzzy matching or by a language model")
    return {kind: problems[:limit] for kind, problems in kinds.items()}


def is_correct(answer: str, gold: str) -> bool:
    """The same items in any order, whatever their case, quotes and brackets."""

    def items(text: str) -> set[str]:
        return {part.strip(" .'\"") for part in re.split(r"[,;\n]", text.strip(" .[]").casefold())} - {""}

    return items(answer) == items(gold)


class QueryingSeat:
    """A student that may query in <execute>SOQL</execute> and is shown the rows, until it answers or has no turn left.

    To the arms of eval.py it is a seat like any other: the last reply counts, at the price of the tokens of all turns. All
    conversations advance together, so that a turn is one call of the seat within.
    """

    def __init__(self, seat: Seat, query: Query):
        self.seat, self.query, self.count_tokens = seat, query, seat.count_tokens

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        states = [q._replace(seed=q.seed + sample, n=1) for q in questions for sample in range(q.n)]
        replies = [Reply("", 0, False)] * len(states)
        pending = list(range(len(states)))
        for turn in range(TURNS):
            if not pending:
                break
            asked = [states[index]._replace(seed=states[index].seed + turn * 1_000_003) for index in pending]
            answers, answered, pending = self.seat.ask(asked, progress), pending, []
            for index, (reply,) in zip(answered, answers):
                replies[index] = Reply(reply.text, replies[index].tokens + reply.tokens, reply.is_truncated)
                found = re.search(r"<execute>(.*?)</execute>", visible(reply.text), re.DOTALL)
                if found:
                    said = {"role": "assistant", "content": found.string[: found.end()]}  # no invented rows
                    rows, is_valid = self.query(found[1].strip())
                    rows = rows[:SHOWN_CHARACTERS] + (" ... (more)" if len(rows) > SHOWN_CHARACTERS else "")
                    told = {"role": "user", "content": f"{'Rows' if is_valid else 'Error'}: {rows}"}
                    states[index] = states[index]._replace(messages=[*states[index].messages, said, told])
                    pending.append(index)
        remaining = iter(replies)
        return [list(islice(remaining, question.n)) for question in questions]


def salesforce() -> Query:
    """Queries in the user's own organisation. Raises UserError naming what is missing."""
    missing = [name for name in ACCOUNT.values() if not os.environ.get(name)]
    if missing:
        raise UserError(f"--bench crmarena queries CRMArena-Pro's Salesforce: set {', '.join(missing)}")
    try:
        from simple_salesforce import Salesforce, exceptions
    except ImportError:
        raise UserError("--bench crmarena needs a package: pip install simple-salesforce") from None
    organisation = Salesforce(**{name: os.environ[variable] for name, variable in ACCOUNT.items()})

    def query(text: str) -> tuple[str, bool]:
        try:
            if text.upper().startswith("FIND"):  # SOSL
                rows = organisation.search(text)["searchRecords"]
            else:
                rows = organisation.query_all(text)["records"]
        except exceptions.SalesforceError as error:
            return str(error.content), False
        return json.dumps([{k: v for k, v in row.items() if k != "attributes"} for row in rows]), True

    return query


def tables(config: ArmsConfig, results: Collection[TaskResult]) -> str:
    """What accuracy on policy violations hides: always answering None, and how many violations are found, whichever article."""

    def row(name: str, answers: Sequence[tuple[str | None, str]]) -> list[str]:  # of pairs (answer, gold)
        right = [answer is not None and is_correct(answer, gold) for answer, gold in answers]
        claims = [bool(answer) and not is_correct(answer, "None") for answer, _ in answers]
        found = [claim for claim, (_, gold) in zip(claims, answers) if not is_correct(gold, "None")]
        rates = (f"{100 * mean(values):.1f}" if values else "–" for values in (right, found))
        return [name, str(len(answers)), *rates]

    rows = [["policy violations", "answers", "accuracy", "violations found"]]
    for arm in config.arms:
        mine = [(r.attempt.answer, r.gold) for r in results if (r.arm, r.domain) == (arm, VIOLATION)]
        if mine:
            rows.append(row(config.names[arm], mine))
            floor = row("floor: always None", [("None", gold) for _, gold in mine])
    return "\n".join(["", *scores.table([*rows, floor]), ""]) if len(rows) > 1 else ""
