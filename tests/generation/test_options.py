"""Options that are out of range or that do not fit the model."""

import pytest
from toy_lm import CONTEXT, LETTERS, make_lm, masked

from bd3lm_jax.core.errors import UserError


@pytest.mark.parametrize("options, message", [
    ({"samplr": "ancestral"}, "unknown option 'samplr': did you mean 'sampler'"),
    ({"steps": 0}, "steps is 0, expected at least 1"),
    ({"threshold": -0.1}, "threshold is -0.1, expected at least 0"),
    ({"threshold": float("nan")}, "threshold is nan"),
    ({"min_length": -1}, "min_length is -1, expected at least 0"),
    ({"min_p": 2}, "min_p is 2"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"cache_dtype": "int4"}, "unknown cache_dtype 'int4'"),
    ({"block_size": 2}, "block_size is 2, expected 4, the one it was trained with"),
    ({"forbidden": [13]}, "forbidden token 13 is out of range, expected 0 to 12"),
    ({"forbidden": list(range(12))}, "every token is forbidden"),
    ({"forbidden": [0, 1, 2, *range(4, 12)], "min_length": 1, "tokenizer": LETTERS}, "every token is forbidden"),
    ({"stop": "ab"}, "stop strings need a tokenizer"),
    ({"length": CONTEXT + 1}, "or a sliding window"),
])
def test_bad_options(options, message):
    tokenizer = options.pop("tokenizer", None)
    with pytest.raises(UserError, match=message) as error:
        make_lm(tokenizer=tokenizer).generate(**{"length": 10, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    ({"block_size": 12, "sampler": "remdm_cap"}, "sampler 'remdm_cap' rewrites the whole block: leave block_size out"),
    ({"block_size": 25}, "block_size is 25, expected 1 to 24"),
    ({"block_size": 0}, "block_size is 0, expected 1 to 24"),
    ({"stop": ["a", ""]}, "a stop string is empty")])
def test_bad_options_of_a_bidirectional_model(options, message):
    with pytest.raises(UserError, match=message):
        make_lm(masked(CONTEXT), tokenizer=LETTERS).generate(length=10, **options)
