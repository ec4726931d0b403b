"""How options are checked: every option has an owner (a sampler, the filters, a cache, a constraint, ...), which says
beside its own code what it needs of a model and which options do not go with it.

An owner's check is a function of (lm, options) that raises UserError; `options.OWNERS` lists them all.
"""

from collections.abc import Sequence
from typing import Any

from bd3lm_jax.core.errors import UserError

FIELD_OF = {"sliding_window": "window", "fixed_tokens": "forced", "guidance_scale": "guidance"}  # keyword: its field


def changed(options: Any, names: Sequence[str]) -> list[str]:
    """Those of the options `names` that are not at their defaults."""
    defaults = type(options)()
    fields = {name: FIELD_OF.get(name, name) for name in names}
    return [name for name, field in fields.items() if getattr(options, field) != getattr(defaults, field)]


def refuse(options: Any, names: Sequence[str], message: str) -> None:
    """UserError with the message, in which {name} is the first of the options `names` that is not at its default."""
    for name in changed(options, names):
        raise UserError(message.replace("{name}", name))
