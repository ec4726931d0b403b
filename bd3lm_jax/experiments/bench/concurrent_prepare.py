"""Many processes that prepare the same text at the same moment; a program that imports once and forks them.

`python -m bd3lm_jax.experiments.bench.concurrent_prepare` with one word,
`'{"data": {...}, "processes": 200, "killed": 20, "within_s": 1.0,
"part_chars": 2000, "seed": 0}'`. data: fields of DataConfig. killed: so many of them get SIGKILL at random moments of
the first `within_s` seconds. The result is a JSON object: codes, the exit codes of those that were not killed;
contents, the hashes of the rows and tokenizers that they got; errors, what they died of.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time

from bd3lm_jax.config import DataConfig
from bd3lm_jax.core.errors import one_line
from bd3lm_jax.data import parts
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer

BLOCK_SIZE = 4


def content(data: DataConfig) -> str:
    """Prepare the train split; a hash of the tokenizer and of all files but the manifest, which names versions."""
    tokenizer = prepare_tokenizer(data)
    path = prepare(data, "train", BLOCK_SIZE, tokenizer).path
    found = hashlib.sha256(tokenizer.to_bytes())
    for file in sorted(path.glob("*.npy")):
        found.update(file.read_bytes())
    return found.hexdigest()


def _child(data: DataConfig, start: int, results: int) -> int:
    """Wait for the start, which is the end of a pipe; the exit code. Its line is shorter than what a pipe cuts."""
    os.read(start, 1)
    try:
        line, code = {"content": content(data)}, 0
    except Exception as error:
        line, code = {"error": f"{type(error).__name__}: {one_line(error)}"[:500]}, 1
    os.write(results, json.dumps(line).encode() + b"\n")
    return code


def _fork(data: DataConfig, number: int, results: int) -> tuple[list[int], int]:
    """Process ids, and the pipe whose closing starts them."""
    start, go = os.pipe()
    found = []
    for _ in range(number):
        if not (pid := os.fork()):
            os.close(go)
            os._exit(_child(data, start, results))
        found.append(pid)
    return found, go


def _kill(pids: list[int], moments: list[float]) -> None:
    began = time.monotonic()
    for pid, moment in zip(pids, sorted(moments)):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main(words: list[str]) -> None:
    arguments = json.loads(words[0])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of the children, whose fork its threads would not survive
    parts.PART_CHARS = arguments["part_chars"]
    data, draw = DataConfig(**arguments["data"] | {"mixture": ()}), random.Random(arguments["seed"])
    reader, writer = os.pipe()
    pids, go = _fork(data, arguments["processes"], writer)
    os.close(writer)
    os.close(go)
    victims = draw.sample(pids, arguments["killed"])
    _kill(victims, [draw.uniform(0, arguments["within_s"]) for _ in victims])
    with open(reader, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    codes = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}
    print(json.dumps({"codes": [code for pid, code in codes.items() if pid not in victims],
                      "contents": sorted({line["content"] for line in lines if "content" in line}),
                      "errors": [line["error"] for line in lines if "error" in line]}))


if __name__ == "__main__":
    main(sys.argv[1:])
