"""A process that renders chat templates, which are programs from elsewhere: `python -P chat_child.py`, no part of the
package imported.

It reads JSON lines: first {"template", "variables", "now", "limits": {"cpu_s", "memory_mib", "characters"}}, then
requests {"messages", "calls": [[number of messages, whether an answer is to follow], ...]}. Each is answered by one
line, {"texts": [...]} or {"error": ..., "line": ... or null}. The template environment is the immutable sandbox of
jinja2; the limits of the process stop loops and texts without end.
"""

import datetime
import functools
import json
import sys

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = "<template>"  # what jinja2 calls a template that is no file


class Generation(Extension):
    """`{% generation %}` marks what the model wrote; the text is what stands inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def make_environment(now: str):
    """What transformers gives a chat template: its blocks, filters and functions."""
    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.datetime.fromisoformat(now).strftime
    return environment


def render(template, variables: dict, messages: list, prompts_answer: bool, characters: int) -> str:
    parts, size = [], 0
    for part in template.generate(messages=messages, add_generation_prompt=prompts_answer, **variables):
        size += len(part)
        if size > characters:
            raise OverflowError(f"more than {characters:,} characters of text")
        parts.append(part)
    return "".join(parts)


def error_record(error: BaseException) -> dict:
    """The error and the line of the template that it comes from."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == HERE:
            line = trace.tb_lineno
        trace = trace.tb_next
    own = isinstance(error, TemplateError)
    text = " ".join(str(error).split())
    return {"error": text if own and text else f"{type(error).__name__}: {text}".removesuffix(": "), "line": line}


def limit(cpu_s: float, memory_mib: int) -> None:
    """For what comes next; the memory counts what the process has."""
    try:
        import resource
    except ImportError:  # there, the caller's clock alone stops it
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    for kind, soft in ((resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + cpu_s) + 1),
                       (resource.RLIMIT_AS, memory_mib << 20), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        try:
            resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
        except (OSError, ValueError):  # some systems do not have a limit of address space
            pass


def main() -> None:
    answers = sys.stdout
    setup = json.loads(sys.stdin.readline())
    limits, variables = setup["limits"], setup["variables"]

    def answer(work) -> None:
        limit(limits["cpu_s"], limits["memory_mib"])
        try:
            line = json.dumps(work())
        except Exception as error:  # whatever a program raises is its error
            line = json.dumps(error_record(error))
        answers.write(line + "\n")
        answers.flush()

    template = None

    def compile_template() -> dict:
        nonlocal template
        template = make_environment(setup["now"]).from_string(setup["template"])
        return {"texts": []}

    def render_calls(messages: list, calls: list) -> dict:
        return {"texts": [render(template, variables, messages[:count], prompts_answer, limits["characters"])
                          for count, prompts_answer in calls]}

    answer(compile_template)
    for line in sys.stdin:
        answer(functools.partial(render_calls, **json.loads(line)))


if __name__ == "__main__":
    main()
