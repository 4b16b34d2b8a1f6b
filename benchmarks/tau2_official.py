"""The dialogues of `eval.py --bench tau2` in τ²-bench's own format, for `tau2 view` and `tau2 evaluate-trajs`.

    python -m benchmarks.tau2_official --out runs/mms      # writes tau2-<arm>.json there

The package tau2 and its data must be here, as for the evaluation.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nano_atlas.benches import tau2
from nano_atlas.benches.arms import read_results
from nano_atlas.config import option, parse, run_script
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json, replace_text
from nano_atlas.text import masked


@dataclass(frozen=True)
class Config:
    out: Path = option(Path("runs/tau2"), "output directory of the evaluation")


def official(config: tau2.Config, tasks: Sequence, arm: str, simulations: Sequence[dict]) -> str:
    """An arm in tau2's own format; tasks: of tau2. Its metrics leave out infrastructure errors; without any, the means are equal."""
    from tau2.data_model.simulation import Results, TextRunConfig
    from tau2.runner import get_info

    run = {"domain": config.domain, "num_trials": config.samples, "max_steps": config.max_steps}
    student, user = masked(config.student), masked(config.user)
    run |= {"llm_agent": f"{student} ({arm})", "llm_args_agent": {"temperature": config.temperature}}
    run |= {"llm_user": user, "llm_args_user": {"temperature": 0.0}, "seed": config.seed}
    run |= {"agent": "llm_agent_solo", "user": "dummy_user"} if config.is_solo else {}
    info = get_info(TextRunConfig(**run))
    return Results(info=info, tasks=tasks, simulations=simulations).model_dump_json(indent=1)


def main(argv: Sequence[str] | None = None) -> None:
    out = parse(Config, sys.argv[1:] if argv is None else argv, {}, __doc__).out
    try:
        from nano_atlas.benches import dialogue
    except ImportError as error:
        raise UserError(f"{error}\n{tau2.INSTALL}") from None
    saved = read_json(out / "run.json").get("config")
    if saved is None:
        raise UserError(f"{out} holds no evaluation: no run.json; --out names that of eval.py --bench tau2")
    config = tau2.Config(**saved | {"out": out})
    tasks, results = dialogue.load_tasks(config), read_results(out / "tasks.jsonl").values()
    for arm in config.arms:
        simulations = [result.record for result in results if result.arm == arm]
        replace_text(out / f"tau2-{arm}.json", official(config, tasks, arm, simulations))


if __name__ == "__main__":
    run_script(main)
