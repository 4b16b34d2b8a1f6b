"""The installed commands: `nano-atlas-train-sft` runs train_sft.py. A wheel has the scripts in nano_atlas/scripts, a checkout at its top."""

import runpy
import sys
from pathlib import Path

SCRIPTS = next(at for at in (Path(__file__).parent / "scripts", Path(__file__).parents[1]) if at.is_dir())


def main() -> None:
    script = Path(sys.argv[0]).stem.removeprefix("nano-atlas-").replace("-", "_") + ".py"
    sys.path.insert(0, str(SCRIPTS))  # as `python SCRIPT` does
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
