"""Plain text from the tokenised forms in which benchmark texts are distributed.

A style is a list of regular expressions and their replacements, applied in order to the document between two spaces;
they undo what each corpus did to its text, as the evaluations of SEDD (arXiv 2310.16834) and MDLM (arXiv 2406.07524)
do, oddities included (a joined "s '" also where a quotation opens), so that figures compare.
"""

import re

from bd3lm_jax.core.errors import lookup

Rules = tuple[tuple[str, str], ...]

_PAIRS: Rules = (  # text between brackets or quotes, which touch it
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_WIKITEXT: Rules = (
    (r"s '", "s'"),
    (r" @([-,.])@ ", r"\1"),
    (r" ([:;.!?,])(?= )", r"\1"),
    *_PAIRS,
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)
_PTB: Rules = (
    (r" 's", "'s"),
    (r"s ' ", "s' "),
    (r" n't", "n't"),
    (r" \n ", "\n"),
    (r"\\/", "/"),
    (r"(?<= )N(?= )", "1"),
    (r"([$#]) 1", r"\g<1>1"),
    (r"<unk>", "?"),
)
_LM1B: Rules = (
    (r"(https?) : / / ", r"\1://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" ([?!,:;])(?= )", r"\1"),
    (r" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"([$£]) ", r"\1"),
)
_LAMBADA: Rules = (
    (r"[“”]", '"'),
    (r" ([.,!?;:])(?= )", r"\1"),
    (r"`` ?", '"'),
    (r" ?''", '"'),
    (r" (n't|'\w+)", r"\1"),
    (r"^\s*", "\n"),
)
RULES: dict[str, Rules] = {"plain": (), "wikitext": _WIKITEXT, "ptb": _PTB, "lm1b": _LM1B, "lambada": _LAMBADA,
                           "scientific_papers": _WIKITEXT + _LM1B}


def rules_of(style: str) -> Rules:
    """Regular expressions and replacements of a style. UserError if there is none of that name."""
    return lookup(RULES, style, "detokeniser")


def detokenize(text: str, style: str) -> str:
    """The document as plain text, without spaces around it; "plain" leaves it as it is.

    Lambada keeps the line break that its evaluations put before the passage.
    """
    rules = rules_of(style)
    if not rules:
        return text
    text = f" {text.strip()} "
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text.strip(" ")
