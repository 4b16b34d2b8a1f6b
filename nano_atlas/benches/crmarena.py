"""CRMArena-Pro: questions about a customer's data, which the student may query in Salesforce's language before it answers.

    pip install simple-salesforce
    export SALESFORCE_USERNAME=... SALESFORCE_PASSWORD=... SALESFORCE_SECURITY_TOKEN=...
    python eval.py --preset own --bench crmarena --data b2b.jsonl --student URL --teacher grpo=URL --out runs/crm

**This has not been run against the live organisation**: tasks and data are not free to ship (CC BY-NC 4.0), credentials change, and
the loop has been tested on a synthetic fixture only. A line of the tasks file is a record of the published data set, with idx,
task, query, answer (a list), metadata {required, optional} and reward_metric.

The student asks in <execute>SOQL</execute> and is shown the rows, until it answers or has no turn left. All arms and controls of
eval.py apply, because to them such a student is a seat like any other.

Simplified against the original: answers stand in <solution> instead of being extracted by gpt-4o, so figures are not those of
the official extractor; only tasks with exact matching are taken (no fuzzy matching, no language model as judge of privacy); no
simulated user.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

from nano_atlas.benches import scores
from nano_atlas.benches.results import TaskResult
from nano_atlas.data import Problem, read_jsonl
from nano_atlas.errors import UserError
from nano_atlas.protocol import visible
from nano_atlas.seats import Question, Reply, Seat

TURNS = 20  # queries and the answer, as in the original
SHOWN_CHARACTERS = 4000  # of a query's rows
VIOLATION = "policy_violation_identification"  # its gold answer is the violated article, or "None"
ACCOUNT = ("SALESFORCE_USERNAME", "SALESFORCE_PASSWORD", "SALESFORCE_SECURITY_TOKEN")
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
        missing = [name for name in ("idx", "task", "query", "answer", "reward_metric") if name not in record]
        if missing or not isinstance(record["answer"], list) or not record["answer"]:
            raise UserError(
                f"{path}:{number}: not a CRMArena-Pro record; it needs {', '.join(missing) or 'a list as answer'}"
            )
        if record["reward_metric"] != "exact_match":
            left_out += 1
            continue
        context = (record.get("metadata") or {}).get("required") or ""
        question = "\n\n".join(part for part in (str(context), str(record["query"]), INSTRUCTION) if part)
        gold = ", ".join("None" if item is None else str(item) for item in record["answer"])
        kinds.setdefault(record["task"], []).append(
            Problem(f"{record['task']}:{record['idx']}", question, gold, record["task"])
        )
    if not kinds:
        raise UserError(
            f"{path}: none of its {left_out} tasks is scored by exact_match; others are not supported"
        )
    if left_out:
        print(f"{path}: {left_out} tasks left out, which are scored by fuzzy matching or by a language model")
    return {kind: problems[:limit] for kind, problems in kinds.items()}


def is_correct(answer: str, gold: str) -> bool:
    """The same items in any order, whatever their case, quotes and brackets."""
    return _items(answer) == _items(gold)


def _items(answer: str) -> set[str]:
    parts = re.split(r"[,;\n]", answer.strip(" .[]").casefold())
    return {part.strip(" .'\"") for part in parts} - {""}


class QueryingSeat:
    """A student whose replies may hold queries: each is answered with its rows, and the last reply is the one that counts.

    All conversations advance together, so that a turn is one call of the seat within. Tokens are those of all turns.
    """

    def __init__(self, seat: Seat, query: Query):
        self.seat, self.query = seat, query
        self.count_tokens = seat.count_tokens

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        states = [q._replace(seed=q.seed + sample, n=1) for q in questions for sample in range(q.n)]
        replies = [reply for group in self.seat.ask(questions, progress) for reply in group]
        for turn in range(1, TURNS):
            queries = {
                index: found
                for index, reply in enumerate(replies)
                if (found := re.search(r"<execute>(.*?)</execute>", visible(reply.text), re.DOTALL))
            }
            if not queries:
                break
            for index, found in queries.items():
                rows, is_valid = self.query(found[1].strip())
                shown = rows[:SHOWN_CHARACTERS] + (" ... (more rows)" if len(rows) > SHOWN_CHARACTERS else "")
                said = {
                    "role": "assistant",
                    "content": found.string[: found.end()],
                }  # not the rows it made up
                told = {"role": "user", "content": f"{'Rows' if is_valid else 'Error'}: {shown}"}
                states[index] = states[index]._replace(messages=[*states[index].messages, said, told])
            again = self.seat.ask(
                [states[i]._replace(seed=states[i].seed + turn * 1_000_003) for i in queries]
            )
            for index, (reply,) in zip(queries, again):
                replies[index] = Reply(reply.text, replies[index].tokens + reply.tokens, reply.is_truncated)
        remaining = iter(replies)
        return [list(islice(remaining, question.n)) for question in questions]


def salesforce() -> Query:
    """Queries in the user's own organisation. Raises UserError naming what is missing."""
    missing = [name for name in ACCOUNT if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"--bench crmarena queries a Salesforce organisation: set {', '.join(missing)} to those of CRMArena-Pro's"
        )
    try:
        import simple_salesforce
    except ImportError:
        raise UserError("--bench crmarena needs a package: pip install simple-salesforce") from None
    user, password, token = (os.environ[name] for name in ACCOUNT)
    organisation = simple_salesforce.Salesforce(username=user, password=password, security_token=token)

    def query(text: str) -> tuple[str, bool]:
        try:
            is_search = text.upper().startswith("FIND")  # SOSL
            found = (
                organisation.search(text)["searchRecords"]
                if is_search
                else organisation.query_all(text)["records"]
            )
        except simple_salesforce.exceptions.SalesforceError as error:
            return str(error.content), False
        return json.dumps(
            [{key: value for key, value in row.items() if key != "attributes"} for row in found]
        ), True

    return query


def tables(results: Iterable[TaskResult], arms: Sequence[str], names: dict[str, str]) -> str:
    """What accuracy on policy violations hides: always answering None beside recall and precision on the violating cases."""
    by_arm: dict[str, list[TaskResult]] = {}
    for result in results:
        if result.domain == VIOLATION:
            by_arm.setdefault(result.arm, []).append(result)
    if not by_arm:
        return ""
    rows = [["policy violations", "answers", "accuracy", "recall", "precision"]]
    none = _items("None")
    for arm in (arm for arm in arms if arm in by_arm):
        answers = by_arm[arm]
        violating = [result for result in answers if _items(result.gold) != none]
        claimed = [
            result for result in answers if result.attempt.answer and _items(result.attempt.answer) != none
        ]
        found = sum(_items(result.gold) != none for result in claimed)
        rows.append(
            [
                names.get(arm, arm),
                str(len(answers)),
                _share(sum(r.attempt.is_correct for r in answers), len(answers)),
                _share(found, len(violating)),
                _share(found, len(claimed)),
            ]
        )
    answers = next(iter(by_arm.values()))
    floor = sum(_items(result.gold) == none for result in answers)
    rows.append(
        [
            "floor: always None",
            str(len(answers)),
            _share(floor, len(answers)),
            _share(0, len(answers) - floor),
            "–",
        ]
    )
    note = "Recall and precision of saying that there is a violation, whichever; accuracy wants the right article."
    return "\n".join(["", *scores.table(rows), "", note, ""])


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}" if total else "–"
