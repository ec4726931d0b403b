"""Where things are, for tests in any folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
GOLDEN = DATA / "golden"
HF = GOLDEN / "hf"
HELPERS = ROOT / "tests" / "helpers"
