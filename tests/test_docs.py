"""README.md and docs/*.md: every command is parsed and resolved as it stands; one of each form (command and names of
its flags) runs with short settings, unless NOT_RUN says why not; every Python snippet runs."""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from toy_docs import PAGES, ROOT, Command, commands, snippets
from toy_runs import write_text

import bd3lm_jax
from bd3lm_jax.core import plugins
from bd3lm_jax.core.errors import lookup
from bd3lm_jax.data import corpora, domains
from bd3lm_jax.diffusion import OBJECTIVES
from launch import arguments, processes
from launch.__main__ import COMMANDS, main

ADAPTED = "from=gpt2"
NOT_PARSED = {  # part of a command -> why it is no command as it stands
    "launch COMMAND --help": "COMMAND stands for any",
    "tiny.py:...": "... stands for what the table says",
    "eval --baseline": "names a flag",
    ADAPTED: "reads weights, which are there where it is run",
    "configs/smollm2.py": "reads weights of a package that is not installed here",
}
NOT_RUN = {  # part of a command -> why it is only parsed
    " bench ": "minutes and quiet cores; tests/experiments runs each",
    "--distributed": "several hosts; tests/parallel/test_distributed.py",
    "--plan": "compiles networks of billions of parameters; tests/planning",
    "configs/owt.py --split": "downloads a corpus",
    "--curve": "compiles a network at each of five block sizes; tests/evaluation",
    "--parallel": "trains for hours; tests/experiments",
    "--index": "trains for minutes; tests/experiments",
    "--task": "runs generated code; tests/evaluation/tasks",
    "SmolLM2": "a file of a third party; tests/checkpoints/published",
    "LLaDA-8B": "a checkpoint of a third party; tests/checkpoints/published",
    "smollm2": "a file of a third party; tests/checkpoints/published",
    "=DIR": "DIR stands for any run", "=SWEEP": "SWEEP stands for any sweep",
    "GLIBC_TUNABLES": "sets up the memory of a process; the command is another's",
}
EVERY_DAY = ("eval --workdir=runs/tiny --split", "sample --workdir=runs/tiny",
             "infill", "sweep --config=configs/tiny.py --dry_run")  # of the README, in the default run
FILES = {("objectives.md", 0): "my_objective.py", ("sweeps.md", 0): "mine.py",
         **{("extend.md", number): "" for number, _ in enumerate((ROOT / "examples" / "plugins").glob("*.py"))}}
NOT_HERE = {"SmolLM2-135M.gguf", "llama-3.2-1b", "mdlm"}  # checkpoints that snippets load from elsewhere
RUNS = {"ar": "algo=ar", "tiny-ar": "algo=ar", "mdlm": "algo=mdlm", "mixed": "algo=mixed", "joint": "algo=joint",
        "sedd": "algo=sedd", "uniform": "algo=uniform",
        "ssd": "algo=ssd_lm,block_size=16"}  # trained by other commands; else as runs/tiny
TINY = ("--config.model.num_layers=1", "--config.model.hidden_size=32", "--config.model.num_heads=2",
        "--config.data.tokenizer=bytes")
SHORT = ("--config.train.steps=3", "--config.train.batch_size=4", "--config.optim.warmup_steps=0",
         "--config.log.every=1",
         "--config.optim.schedule=constant", "--config.eval.num_samples=1", "--config.eval.sample_length=16",
         "--watchdog_timeout=0")
DOCUMENTS = 16
ALL = [command for page in PAGES for command in commands(page)]
LAUNCHED = [command for command in ALL if command.launch is not None]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkout with little text, in which the commands are given one after the other."""
    path = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "docs", "constraints.txt"):
        (path / name).symlink_to(ROOT / name)
    (path / "my_texts").mkdir()
    for split in ("train", "valid", "test"):
        write_text(path / "my_texts" / f"{split}.txt", 100)
    shutil.copytree(ROOT / "tests/data/golden/hf/roberta", path / "path/to/roberta-base")
    published = json.loads((path / "path/to/roberta-base/config.json").read_text())
    (path / "path/to/roberta-base/config.json").write_text(json.dumps(published | {"mask_token_id": 30}))
    (path / "texts.txt").write_text("It is a truth [MASK:3] that a single man [MASK:2-3] a wife.\n")
    for page in PAGES:
        for number, snippet in enumerate(snippets(page)):
            if name := FILES.get((snippet.page, number)):
                (path / name).write_text(snippet.code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("BD3LM_CACHE", str(path / "cache"))
        patch.setenv("COLUMNS", "160")
        patch.syspath_prepend(str(path))
        austen, plain = corpora.SOURCES["austen"], domains._plain
        patch.setitem(corpora.SOURCES, "austen", lambda data, split: shortened(austen(data, split)))
        patch.setattr(domains, "_plain", lambda corpus, style: shortened(plain(corpus, style)))
        importlib.invalidate_caches()
        yield path
    OBJECTIVES.pop("spans", None)
    sys.modules.pop("my_objective", None)
    plugins._requested.clear()


def shortened(corpus):
    """The beginnings of its first documents."""
    first = itertools.islice
    return dataclasses.replace(corpus, documents=lambda: (text[:300] for text in first(corpus.documents(), DOCUMENTS)),
                               fingerprint=lambda: f"short {corpus.fingerprint()}")


def form(command: Command) -> tuple:
    """What tells commands apart that are worth running: not their values, nor which objective or network it is, all of
    which tests/training/test_objective_runs.py and tests/models/test_model_configs.py train."""
    names = {word.partition("=")[0] for word in command.launch[1:]}
    ignored = ("--config.diffusion.", "--config.model.")
    return command.launch[:1], frozenset(name for name in names - {"--config"} if not name.startswith(ignored))


def to_run() -> list[Command]:
    """The first command of each form; the adaptation, whose forms are those of others, as a whole."""
    found = {}
    for command in LAUNCHED:
        parts = NOT_RUN | {part: why for part, why in NOT_PARSED.items() if part != ADAPTED}
        bare = len(command.launch) < 2 and command.launch != ("doctor",)
        if not reason(parts, command) and not bare and command.launch[0] != "tpu":  # which the test above runs
            key = command.text if ADAPTED in command.text else form(command)
            found.setdefault(key, command)
    return list(found.values())


def reason(reasons: dict[str, str], command: Command) -> str:
    return next((why for part, why in reasons.items() if part in command.text), "")


# ---- as they stand


def test_there_are_commands_on_most_pages():
    assert len(LAUNCHED) > 130 and {command.launch[0] for command in LAUNCHED if command.launch} >= set(COMMANDS)
    for reasons in (NOT_PARSED, NOT_RUN):
        unused = [part for part in reasons if not any(part in command.text for command in ALL)]
        assert not unused, "exceptions that nothing needs"


@pytest.mark.parametrize("command", LAUNCHED, ids=lambda command: f"{command.page}: {command.text}"[:90])
def test_command_is_parsed_and_resolved(command, home):
    if reason(NOT_PARSED, command):
        return
    name, *rest = command.launch or ("doctor",)
    module = importlib.import_module(f"launch.{name}")
    rest = arguments.common(rest)
    if getattr(module, "TAKES_COMMAND", False):
        before, words = arguments.split_command(rest)
        args = arguments.parse_flags(module.define, before)
        if words:
            assert module.main(args, words)["actions"]
        return
    spec, overrides, rest = arguments.split_config(rest) if module.TAKES_CONFIG else ("", [], rest)
    args = arguments.parse_flags(module.define, rest, getattr(module, "POSITIONAL", None))
    if name == "sweep":
        assert module.load_points(spec, overrides)
    elif module.TAKES_CONFIG:
        arguments.load_config(spec, overrides)
    if name == "train":
        module.parse_mesh(args.mesh)
        processes.check(args)
    if name == "eval":
        module.check(args)
    if name == "bench" and args.name:
        from bd3lm_jax.experiments.bench import BENCHES

        lookup(BENCHES, args.name, "benchmark")


OTHERS = [command for command in ALL if command.launch is None]


@pytest.mark.parametrize("command", OTHERS, ids=lambda command: f"{command.page}: {command.text}"[:90])
def test_what_other_commands_name_is_there(command):
    extras = re.findall(r"\.\[(\w+)\]", " ".join(command.words))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert known.keys() >= set(extras)
    module = command.words[2] if command.words[:2] == ("python", "-m") else ""
    assert not module or importlib.util.find_spec(module)
    files = [word for word in command.words if re.search(r"\.(py|txt)$", word) and "/" in word]
    assert all((ROOT / file).is_file() for file in files)


# ---- with short settings


def run(*words: str) -> str:
    """The result of a command that ends well: the last line of stdout."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    assert code == 0, f"{' '.join(words)}\n{err.getvalue()[-2000:]}\n{out.getvalue()[-500:]}"
    return out.getvalue().strip().splitlines()[-1]


def run_short(command: Command) -> None:
    name, *words = [word.replace(",...", "") for word in command.launch or ("--help",)]
    for path in runs_of(words) if name != "train" else ():
        ensure(path)
    if name == "train":
        adapted = any("adapt.py" in word for word in words)
        words += [*SHORT, *(["--config.data.seq_len=64", "--config.train.steps=12"] if adapted else TINY)]
        if not any(word.startswith("--workdir") for word in words):  # runs/tiny would be that of several commands
            words.append(f"--workdir=runs/{len(list(Path('runs').glob('*')))}")
        words = [re.sub("(--config.train.block_sizes)=.*", r"\1=((0, 1), (1, 4), (2, 32))", word) for word in words]
        words = [word.replace(ADAPTED, "from=tiny-ar-hf") for word in words]
        if adapted and not Path("tiny-ar-hf").exists():
            ensure("runs/tiny-ar")
            run("convert", "--from=runs/tiny-ar", "--to=tiny-ar-hf")
    if name == "sample":
        words += ["--num_samples=1"]
        if any(re.match("--length=....?$", word) for word in words):
            words += ["--length=144" if "--sliding_window" in words else "--length=100"]
        words += ["--min_length=90"] * any("--min_length" in word for word in words)
    words += ["--mc_samples=1"] * any(word.startswith("--mc_samples") for word in words)
    if name == "eval" and (files := [word for word in words if word.startswith("--samples=")]):
        for file in files[0].partition("=")[2].split(","):
            if not Path(file).exists():
                Path(file).write_text(run("sample", "--workdir=runs/tiny", "--num_samples=2", "--length=100"))
    said = run(name, *words)
    if command.out:
        Path(command.out).write_text(said + "\n")
    if name in COMMANDS and "--help" not in words:
        assert isinstance(json.loads(said), dict)


def runs_of(words: list[str]) -> list[str]:
    """Run directories that a command reads."""
    values = [word.partition("=")[2] for word in words if re.match("--(workdir|baseline|scorer|from)=", word)]
    return [path for value in values for path in value.split(",") if path.startswith("runs/")]


def ensure(path: str) -> None:
    """The run directory, as a page that trains it would leave it; of a sweep, by its name."""
    if Path(path).exists():
        return
    name = Path(path).name
    args = ",".join(word for word in name.split("+") if not word.startswith("seed=")) if "=" in name else RUNS.get(name)
    if args is None and name != "tiny":
        ensure("runs/tiny")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree("runs/tiny", path)
        return
    run("train", f"--config=configs/tiny.py{f':{args}' if args else ''}", f"--workdir={path}", *TINY, *SHORT)


def run_snippets(page: Path) -> None:
    for path in ("runs/tiny", "runs/bd4"):
        ensure(path)
    lm = bd3lm_jax.load("runs/tiny")
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    names = {"bd3lm_jax": bd3lm_jax, "lm": lm, "ids": ids, "tokens_BxL": ids, "xt_BxL": ids, "x0_BxL": ids}
    for number, snippet in enumerate(snippets(page)):
        if (snippet.page, number) in FILES:
            continue  # a file of a command, which runs
        code = snippet.code.replace("tiny.get_config()", "SHORT_CONFIG")
        names["SHORT_CONFIG"] = short_config() if "SHORT_CONFIG" in code else None
        lines = [line for line in code.splitlines() if not any(f'"{path}"' in line for path in NOT_HERE)]
        exec(compile("\n" * snippet.line + "\n".join(lines), snippet.page, "exec"), names)


def short_config():
    """What `tiny.get_config()` of a snippet becomes: as the command line changes it, still a ConfigDict."""
    from configs import tiny

    config = tiny.get_config()
    for word in (*TINY, *SHORT):
        key, _, value = word.removeprefix("--config.").partition("=")
        section, _, leaf = key.partition(".")
        if leaf:
            config[section][leaf] = type(config[section][leaf])(value)
    return config


def test_readme_every_day(home):
    for command in commands(ROOT / "README.md"):
        if command.launch and " ".join(command.launch).startswith(EVERY_DAY):
            run_short(command)


@pytest.mark.ci_slow
@pytest.mark.parametrize("command", to_run(), ids=lambda command: f"{command.page}: {command.text}"[:90])
def test_command_runs(command, home):
    """In the order of the pages: a command may need the run of one before it."""
    run_short(command)


@pytest.mark.ci_slow
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_snippets_run(page, home):
    run_snippets(page)


# ---- how to work on the code


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:bd3lm_jax|configs|docs|launch|\.ci)/[\w./]*)`", text)
    rooms = re.findall(r"^\| `(\w+/|\w+\.py)` \|", text, re.MULTILINE)
    assert len(paths) > 10 and len(rooms) > 10
    assert [path for path in paths + [f"bd3lm_jax/{room}" for room in rooms] if not (ROOT / path).exists()] == []
    registries = re.findall(r"`([A-Z]+)` in `([\w./]+\.py)`", text)
    assert registries and all(re.search(rf"^{name}\b.* = [{{(]", (ROOT / path).read_text(), re.MULTILINE)
                              for name, path in registries)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))],
                         ids=lambda page: page.name)
def test_files_that_pages_name_are_there(page):
    named = set(re.findall(r"\b(?:bd3lm_jax|launch|configs|docs|tests)/[\w/]+\.\w+", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
