"""Inputs and weights against a token-by-token loop; the loss against published numbers."""

import numpy as np
import pytest
from places import GOLDEN

from bd3lm_jax.diffusion.ar import AR
from bd3lm_jax.diffusion.masked import cross_entropy_subs

SEGMENT_BxL = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0], [3, 4, 4, 0, 0, 0], [0, 0, 1, 1, 2, 0]])
X0_BxL = np.arange(10, 34).reshape(4, 6)
END = 99


def test_inputs_restart_with_each_segment():
    inputs_BxL = np.asarray(AR(bos=True).previous_tokens(X0_BxL, SEGMENT_BxL, END))
    for ids, segments, inputs in zip(X0_BxL, SEGMENT_BxL, inputs_BxL):
        previous = {}
        for i, segment in enumerate(segments):
            if segment:
                assert inputs[i] == previous.get(segment, END)
            previous[segment] = ids[i]


def test_weights():
    with_bos = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]]
    without = [[0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    np.testing.assert_array_equal(AR(bos=True).predicted_tokens(SEGMENT_BxL), np.array(with_bos, bool))
    np.testing.assert_array_equal(AR(bos=False).predicted_tokens(SEGMENT_BxL), np.array(without, bool))


@pytest.mark.parametrize("bos", [True, False])
def test_corrupt_has_the_form_of_every_objective(bos):
    model = AR(bos=bos)
    noised = model.corrupt(None, X0_BxL, SEGMENT_BxL, 1, -1, END)
    np.testing.assert_array_equal(noised.xt_BxMxL[:, 0, :2], [[END, 10], [END, 16], [END, END], [END, 28]])
    np.testing.assert_array_equal((noised.weight_BxMxL[:, 0] > 0).sum(1), [6, 5, 3, 3] if bos else [5, 3, 1, 1])
    assert noised.capacity == 6 and not np.any(noised.sigma_BxMxK) and model.is_bound == bos


def test_no_token_reads_itself_or_the_future():
    changed_BxL = X0_BxL.copy()
    changed_BxL[:, 3] = 77
    before, after = (np.asarray(AR(bos=True).previous_tokens(x0, SEGMENT_BxL, END)) for x0 in (X0_BxL, changed_BxL))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    read_by_the_next = before[:, 4] != after[:, 4]
    assert read_by_the_next[:2].all() and not read_by_the_next[3]  # the last row starts a segment there


def test_published_log_probs():
    golden = np.load(GOLDEN / "ar/io.npz")
    nll_BxL = [cross_entropy_subs(logits[:-1], ids[1:], int(golden["mask_id"]))
               for logits, ids in zip(golden["logits"], golden["x0"])]
    np.testing.assert_allclose(nll_BxL, golden["token_nll"], atol=2e-5)


@pytest.mark.parametrize("bos", [True, False])
def test_block_size_is_one_token(bos):
    assert AR(bos=bos).block_size == 1 and AR.kind == "ar"
