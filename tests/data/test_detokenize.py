"""Pairs written by hand: what a corpus distributes and the text it was made from."""

import pytest

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.detokenize import RULES, detokenize

PAIRS = {
    "wikitext": [
        (" = = Early life = = ", "== Early life =="),
        (" = Title = ", "= Title ="),
        ("It cost 1 @,@ 500 or 0 @.@ 7 of a well @-@ known sum .", "It cost 1,500 or 0.7 of a well-known sum."),
        ("He asked : why ? No , really ! Then ; so .", "He asked: why? No, really! Then; so."),
        ("Oats ( Avena , [ 3 ] and { x } ) grow at 9 ° C", "Oats (Avena, [3] and {x}) grow at 9°C"),
        ('The " red " one \'s claw and the dogs \' tails', 'The "red" one\'s claw and the dogs\' tails'),
        ("Wait . . . , he said .", "Wait..., he said."),
        (" First line . \n Second line . ", "First line.\nSecond line."),
        ("a <unk> word", "a <unk> word"),
    ],
    "ptb": [
        ("the company 's offer was n't $ N billion", "the company's offer wasn't $1 billion"),
        ("N N N times the <unk> and traders ' fees", "1 1 1 times the ? and traders' fees"),
        ("class a\\/b shares # N", "class a/b shares #1"),
        ("Nine Nations", "Nine Nations"),
    ],
    "lm1b": [
        ('He said : " We \'re ready , " and left .', 'He said: "We\'re ready," and left.'),
        ("http : / / x.org and https : / / y.org ( or [ 1 ] ) now .", "http://x.org and https://y.org (or [1]) now."),
        ("$ 5 or £ 4 and / or both ? Yes ! Well ; no .", "$5 or £4 and/or both? Yes! Well; no."),
    ],
    "lambada": [
        ("“Don't go,” she said.", '\n"Don\'t go," she said.'),
        ("`` do n't go , '' she said . `` i 'm here ; ok ? ''", '\n"don\'t go," she said. "i\'m here; ok?"'),
    ],
    "scientific_papers": [
        ("we show that @-@ as in ( smith , 1999 ) - it holds . \nnext , see $ x $ .",
         "we show that-as in (smith, 1999) - it holds.\nnext, see $x $."),
    ],
    "plain": [(" Wall St. , # 39 ; as it is .", " Wall St. , # 39 ; as it is .")],
}


def test_every_style_has_pairs():
    assert PAIRS.keys() == RULES.keys()


@pytest.mark.parametrize("style, tokenised, text", [(style, *pair) for style, pairs in PAIRS.items() for pair in pairs])
def test_pairs(style, tokenised, text):
    assert detokenize(tokenised, style) == text


@pytest.mark.parametrize("style", ["plain", "wikitext", "ptb", "lm1b", "scientific_papers"])
def test_ordinary_text_stays_as_it_is(style):
    text = 'Mr. Brown (of "The Firm") isn\'t here; he\'s at 5-7 High St., isn\'t he? Yes: $3.50 a day!'
    assert detokenize(text, style) == text


def test_unknown_style():
    with pytest.raises(UserError, match="unknown detokeniser 'wiki'.*did you mean 'wikitext'"):
        detokenize("x", "wiki")
