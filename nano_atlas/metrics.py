"""What a run measured: one JSON object per line in `metrics.jsonl`, and on Weights & Biases where a project is named."""

import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

from nano_atlas.distributed import rank
from nano_atlas.errors import UserError
from nano_atlas.files import replace_text


class RunLog:
    """Appends records `{"step": 12, "loss": 1.5, ...}` to `directory/filename`, each flushed as it is written.

    A run that starts or continues after `resumed_step` will compute the later steps again, so their records are dropped first:
    every step is in the file once. `config` goes to wandb only.
    Raises UserError when the file is damaged, or when a wandb project is named but wandb is not installed.
    """

    def __init__(
        self,
        directory: Path,
        resumed_step: int = 0,
        *,
        filename: str = "metrics.jsonl",
        wandb_project: str = "",
        wandb_run_name: str = "",
        config: dict[str, Any] | None = None,
    ):
        self.path = Path(directory) / filename
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_first = rank() == 0  # the other ranks write nothing
        if is_first and self.path.exists():
            _keep_until(self.path, resumed_step)
        self._file = (self.path if is_first else Path(os.devnull)).open("a", encoding="utf-8")
        self._wandb = None
        if wandb_project and is_first:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    "--wandb-project needs wandb: pip install wandb, or leave the option out"
                ) from None
            id_file = self.path.with_name(
                "wandb_run.txt"
            )  # the run's id, so that a continued run goes on in the same graph
            if resumed_step == 0 or not id_file.exists():
                id_file.write_text(uuid.uuid4().hex)
            self._wandb = wandb.init(
                project=wandb_project,
                name=wandb_run_name or self.path.resolve().parent.name,
                id=id_file.read_text(),
                resume="allow",
                config=config,
            )

    def log(self, step: int, **metrics: Any) -> None:
        """Write one record: floats to 6 significant digits, or null if not finite; a metric that is None is left out."""
        record = {name: _rounded(value) for name, value in metrics.items() if value is not None}
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(record, step=step)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _keep_until(path: Path, last_step: int) -> None:
    """Rewrite the file, atomically, without the records after `last_step` and without a half-written last line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            if number < len(
                lines
            ):  # a torn last line is what an interrupted write leaves; anywhere else it is damage
                raise UserError(
                    f"{path}:{number}: not a metrics record; mend or delete the file, or use --restart"
                ) from None
    replace_text(path, "".join(line + "\n" for line in kept))
