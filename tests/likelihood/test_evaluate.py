import dataclasses
import itertools
import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from grids import some
from toy_evaluation import evaluated
from toy_runs import AR, END, LENGTH, MASK, network, quick_jit, run_python, toy_config, write_text

from bd3lm_jax.core import stats
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.data.prepare import prepare, prepare_tokenizer
from bd3lm_jax.data.token_bytes import RowsWithBytes
from bd3lm_jax.likelihood.evaluate import Evaluator, Target
from bd3lm_jax.likelihood.options import EstimatorOptions
from bd3lm_jax.models import forward
from bd3lm_jax.parallel import sharding
from bd3lm_jax.scoring.score import SpecialIds
from bd3lm_jax.training.train import train

SPECIAL = SpecialIds(MASK, END)
SEEDS = 40
CAUSAL = {"diffusion": AR, "model.adaln": False}
SINGLE = {"diffusion.block_size": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluate")
    write_text(directory / "text.txt", 100)
    return directory


@pytest.fixture(scope="module")
def prepared(home):
    """`prepared(changes)` -> evaluator, weights, rows of the valid split (the last one is partly padding)."""
    known = {}

    def get(changes=None, split="valid"):
        key = (json.dumps(changes), split)
        if key not in known:
            config = toy_config(home, changes)
            model, params = network(config, scale=0.15)
            tokenizer = prepare_tokenizer(config.data)
            rows = RowsWithBytes(prepare(config.data, split, config.block_size, tokenizer), tokenizer)
            evaluator = Evaluator(config, model, SPECIAL, sharding.make_mesh(config.mesh), config.eval.batch_size,
                                  config.execution)
            known[key] = evaluator, model, params, rows
        return known[key]

    return get


def arrays(rows):
    ids = np.arange(len(rows))
    return rows.tokens(ids), rows.positions(ids), rows.segments(ids), rows.documents(ids)


def log_probs(model, params, h, targets):
    """Of the targets, in float64, where the mask token is impossible."""
    cond = None
    if model.condition is not None:
        cond = model.condition.apply({"params": params["condition"]}, jnp.zeros((1, 1)))
    logits = np.array(model.head.apply({"params": params["head"]}, h, cond), np.float64)
    logits[..., MASK] = -np.inf
    norm = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - norm


def enumerated_bound(model, params, rows, size):
    """Nats of every row: over blocks and k, (1/k) the mean over subsets of k real tokens of their cross-entropies."""
    tokens, position, segment, _ = arrays(rows)
    patterns = np.array(list(itertools.product([False, True], repeat=size))[1:])
    masks = np.tile(patterns, LENGTH // size)  # [15, L]: every block in the same pattern; blocks do not see each other
    xt = np.where(masks[None] & (segment != 0)[:, None], MASK, tokens[:, None])
    h = quick_jit(lambda p: forward.two_stream(model, p, xt, tokens, position, segment, block_size=size,
                                               execution=forward.DEFAULT_EXECUTION))(params)
    nats = -log_probs(model, params, h, np.broadcast_to(tokens[:, None], xt.shape))
    total = np.zeros(len(tokens))
    for row, block in itertools.product(range(len(tokens)), range(LENGTH // size)):
        place = slice(block * size, (block + 1) * size)
        real = segment[row, place] != 0
        for pattern in range(len(patterns)):
            k = patterns[pattern].sum()
            if not np.any(patterns[pattern] & ~real):
                share = nats[row, pattern, place][patterns[pattern]].sum() / k
                total[row] += share / math.comb(real.sum(), k)
    return total


@pytest.fixture(scope="module")
def runs(prepared):
    """Results of many seeds of the toy bound on the valid split."""
    evaluator, _, params, rows = prepared()
    return [evaluator.run(params, rows, estimator="exact_count", draws=1, seed=seed) for seed in range(SEEDS)]


def test_the_bound_is_the_enumerated_one(prepared, runs):
    _, model, params, rows = prepared()
    truth = enumerated_bound(model, params, rows, 4).sum() / rows.meta["tokens"]
    estimate = np.mean([run["nll"] for run in runs])
    error = np.mean([run["nll_mc_se"] for run in runs]) / math.sqrt(SEEDS)
    assert error < 0.01 * truth
    assert abs(estimate - truth) < 3.5 * error


def test_the_stated_monte_carlo_error_is_the_spread_over_seeds(runs):
    """The variance of 40 estimates is within the 99.9 % range of chi-square, widened for its estimated mean."""
    spread = np.std([run["nll"] for run in runs], ddof=1)
    stated = math.sqrt(np.mean([run["nll_mc_se"]**2 for run in runs]))
    assert 0.62 < spread / stated < 1.4


@pytest.mark.ci_slow
def test_eight_draws_have_an_error_smaller_by_the_root_of_eight(prepared):
    evaluator, _, params, rows = prepared(split="train")
    assert len(rows) > 60
    one, eight = (evaluator.run(params, rows, estimator="exact_count", draws=n, seed=3) for n in (1, 8))
    assert one["nll_mc_se"] / eight["nll_mc_se"] == pytest.approx(math.sqrt(8), rel=0.25)
    assert eight["draws"] == 8 and abs(one["nll"] - eight["nll"]) < 4 * one["nll_mc_se"]


def test_twice_the_same_and_whatever_the_batch(prepared):
    evaluator, _, params, rows = prepared()
    first, second = (evaluator.run(params, rows, estimator="exact_count", draws=2, seed=1) for _ in range(2))
    assert {**first, "wall_s": 0} == {**second, "wall_s": 0}
    assert len(rows) % 5
    other = prepared({"eval.batch_size": 5})[0].run(params, rows, estimator="exact_count", draws=2, seed=1)
    for key in ("nll", "nll_mc_se", "bits_per_byte", "ppl"):
        assert other[key] == pytest.approx(first[key], rel=1e-6)
    assert (other["tokens"], other["documents"]) == (first["tokens"], first["documents"])
    assert evaluator.run(params, rows, estimator="exact_count", draws=2, seed=2)["nll"] != first["nll"]


def test_by_count_averages_what_the_bound_is_made_of(prepared, runs):
    """With whole blocks the bound of a token is the mean over k of the nats of a masked token among k."""
    _, model, params, rows = prepared()
    tokens, position, segment, _ = arrays(rows)
    assert set(runs[0]["nll_by_count"]) == {1, 2, 3, 4}
    masks = np.eye(4, dtype=bool)  # k = 1: each place of a block once
    xt = np.where(np.tile(masks, LENGTH // 4)[None] & (segment != 0)[:, None], MASK, tokens[:, None])
    h = quick_jit(lambda p: forward.two_stream(model, p, xt, tokens, position, segment, block_size=4,
                                               execution=forward.DEFAULT_EXECUTION))(params)
    nats = -log_probs(model, params, h, np.broadcast_to(tokens[:, None], xt.shape))
    alone = nats[(xt == MASK)].mean()
    found = [run["nll_by_count"][1] for run in runs]
    assert abs(np.mean(found) - alone) < 4 * np.std(found) / math.sqrt(SEEDS) + 0.02  # the last block may be shorter


def causal_nats(model, params, rows):
    """Nats of every token given those before it in its row, the end token before the first."""
    tokens, position, segment, _ = arrays(rows)
    before = np.concatenate([np.full((len(tokens), 1), END), tokens[:, :-1]], axis=1)
    h = quick_jit(lambda p: forward.one_stream(model, p, before, position, segment, rule="causal", block_size=1,
                                               execution=forward.DEFAULT_EXECUTION))(params)
    return -log_probs(model, params, h, tokens)


@pytest.mark.parametrize("estimator", some(["nll", "exact_count"], 0))
def test_autoregression_is_summed_token_by_token(prepared, estimator):
    evaluator, model, params, rows = prepared(CAUSAL)
    result = evaluator.run(params, rows, estimator=estimator, draws=1, seed=0)
    assert result["estimator"] == "nll"
    nats, documents = causal_nats(model, params, rows), arrays(rows)[3]
    by_document = [nats[documents == d].sum() for d in range(documents.max() + 1)]
    lengths = [(documents == d).sum() for d in range(documents.max() + 1)]
    nll, low, high = stats.ratio_interval(np.array(by_document), np.array(lengths))
    assert result["nll"] == pytest.approx(sum(by_document) / sum(lengths), rel=1e-6)
    np.testing.assert_allclose(result["nll_ci95"], [low, high], rtol=1e-5)
    np.testing.assert_allclose(result["ppl_ci95"], np.exp([low, high]), rtol=1e-4)
    assert result["nll_mc_se"] == 0 and result["ppl"] == pytest.approx(math.exp(nll), rel=1e-6)


def test_blocks_of_one_token_are_the_chain_rule(prepared):
    """The oracle asks one token at a time: a row with its prefix, one mask token and nothing behind."""
    evaluator, model, params, rows = prepared(SINGLE)
    result = evaluator.run(params, rows, estimator="nll", draws=1, seed=0, num_rows=2)
    tokens = rows.tokens(np.arange(2))
    at = np.arange(LENGTH)
    before, here = at[None] < at[:, None], np.eye(LENGTH, dtype=bool)
    position = np.broadcast_to(at, (LENGTH, LENGTH))

    @quick_jit
    def ask(row):
        ids, segment = jnp.where(here, MASK, row), jnp.asarray(before | here, jnp.int32)
        h = forward.one_stream(model, params, ids, position, segment, rule="block_causal", block_size=1,
                               execution=forward.DEFAULT_EXECUTION)
        return h[at, at]

    nats = [-log_probs(model, params, ask(row)[None], row[None]).sum() for row in tokens]
    assert result["nll"] == pytest.approx(sum(nats) / (2 * LENGTH), rel=1e-5)
    assert (result["tokens"], result["nll_mc_se"]) == (2 * LENGTH, 0)


def test_bytes_tokens_and_documents_are_all_counted(home, prepared):
    evaluator, _, params, rows = prepared(CAUSAL)
    documents = (home / "text.txt").read_text(encoding="utf-8").splitlines()[-10:]
    size = sum(len(document.encode()) + 1 for document in documents)
    assert size > sum(len(document) + 1 for document in documents)  # some letters take two bytes
    result = evaluator.run(params, rows, estimator="nll", draws=1, seed=0)
    assert size % LENGTH  # the last row is partly padding
    assert (result["tokens"], result["documents"]) == (size, 10)  # a byte is a token, a newline an end token
    assert result["bits_per_byte"] == pytest.approx(result["nll"] * size / math.log(2) / size, rel=1e-9)


@pytest.mark.ci_slow
@pytest.mark.parametrize("layout", ["pack", "pad"])
def test_layouts_count_the_same_tokens_and_documents(prepared, layout):
    evaluator, _, params, rows = prepared({"data.packing": layout})
    wrapped = prepared()[3]
    result = evaluator.run(params, rows, estimator="exact_count", draws=1, seed=0)
    assert (result["tokens"], result["documents"]) == (wrapped.meta["tokens"], wrapped.meta["documents"])
    assert result["bits_per_byte"] == pytest.approx(result["nll"] / math.log(2), rel=1e-9)


def test_the_first_rows_alone(prepared):
    evaluator, model, params, rows = prepared(CAUSAL)
    result = evaluator.run(params, rows, estimator="nll", draws=1, seed=0, num_rows=3)
    assert result["nll"] == pytest.approx(causal_nats(model, params, rows)[:3].mean(), rel=1e-6)
    assert result["tokens"] == 3 * LENGTH
    assert result["bits_per_byte"] == pytest.approx(result["nll"] / math.log(2), rel=1e-9)


@pytest.mark.parametrize(("estimator", "draws", "message"), [
    ("elbo", 1, "unknown estimator 'elbo': known: bernoulli, exact, exact_count, importance, native, nll"),
    ("nll", 1, "'nll' is exact only for AR and for block size 1 .* this model has block size 4"),
    ("exact_count", 0, "draws is 0, expected at least 1"),
])
def test_wrong_requests(prepared, estimator, draws, message):
    evaluator, _, params, rows = prepared()
    with pytest.raises(UserError, match=message):
        evaluator.run(params, rows, estimator=estimator, draws=draws, seed=0)


@pytest.mark.ci_slow
def test_a_clipped_model_is_measured_by_the_bound(prepared, runs):
    """The way it was trained does not matter: the same network has the same bound."""
    clipped = {"diffusion.corruption": "bernoulli", "diffusion.clip_low": 0.3, "diffusion.clip_high": 0.8}
    evaluator, _, params, rows = prepared(clipped)
    result = evaluator.run(params, rows, estimator="exact_count", draws=1, seed=0)
    assert result["nll"] == pytest.approx(runs[0]["nll"], rel=1e-6)


def test_enumeration_has_no_error(prepared):
    evaluator, model, params, rows = prepared()
    result = evaluator.run(params, rows, estimator="exact", draws=5, seed=0)
    truth = enumerated_bound(model, params, rows, 4).sum() / rows.meta["tokens"]
    assert result["nll"] == pytest.approx(truth, rel=1e-5)
    assert (result["nll_mc_se"], result["draws"], result["estimator"]) == (0, 1, "exact")


@pytest.mark.ci_slow
@pytest.mark.parametrize("estimator", some(["importance", "bernoulli"], 0))
def test_other_estimators_mean_the_same(prepared, estimator):
    evaluator, model, params, rows = prepared()
    truth = enumerated_bound(model, params, rows, 4).sum() / rows.meta["tokens"]
    found = [evaluator.run(params, rows, estimator=estimator, draws=2, seed=seed) for seed in range(3)]
    error = math.sqrt(np.mean([run["nll_mc_se"]**2 for run in found]) / len(found))
    assert abs(np.mean([run["nll"] for run in found]) - truth) < 4 * error < 0.15 * truth
    assert ("count_probs" in found[0]) == (estimator == "importance")


@pytest.mark.ci_slow
def test_draws_until_the_target_is_met(prepared, capsys):
    evaluator, _, params, rows = prepared()
    once = evaluator.measure(params, rows, EstimatorOptions("exact_count", draws=2))
    half = stats.mc_margin(once.rows_UxR) / once.rows_UxR.mean(0).sum()
    tight = evaluator.measure(params, rows, EstimatorOptions("exact_count", 2, target=Target(half / 2, 64)))
    assert once.draws == 2 and 4 <= tight.draws <= 20 and tight.draws % 2 == 0
    assert stats.mc_margin(tight.rows_UxR) / tight.rows_UxR.mean(0).sum() <= half / 2
    np.testing.assert_allclose(tight.rows_UxR[:2], once.rows_UxR, rtol=1e-9)  # the first round is what one round is
    assert "more draws cannot shrink the part that comes from the choice of documents" in capsys.readouterr().err
    exact = evaluator.measure(params, rows, EstimatorOptions("exact", 2, target=Target(1e-9, 2)))
    assert exact.draws == 1


@pytest.mark.ci_slow
@pytest.mark.parametrize(("ci", "max_draws"), [(1e-6, 8), (0.004, 1)])
def test_a_target_out_of_reach(prepared, ci, max_draws):
    evaluator, _, params, rows = prepared()
    with pytest.raises(RunError, match=r"is \+- .*% of the nll after \d draws? .* about \d+ draws and --max_mc_s"):
        evaluator.measure(params, rows, EstimatorOptions("exact_count", target=Target(ci, max_draws)))


@pytest.mark.ci_slow
def test_tokens_that_nobody_predicts_are_not_counted(prepared):
    evaluator, _, params, rows = prepared({"diffusion": {"kind": "ar", "bos": False}, "model.adaln": False})
    result = evaluator.run(params, rows, estimator="nll", draws=1, seed=0)
    assert result["tokens"] == rows.meta["tokens"] - len(rows)  # the first token of each row
    assert result["bits_per_byte"] / result["nll"] == pytest.approx(
        rows.meta["tokens"] / rows.meta["bytes"] / math.log(2))


# ---- a run directory


@pytest.fixture(scope="module")
def run(home):
    workdir = home / "run"
    train(toy_config(home, {"train.steps": 2}), str(workdir))
    return workdir


@pytest.mark.ci_slow
def test_eval_of_a_run_is_repeatable_and_complete(run):
    first, second = evaluated(run), evaluated(run)
    assert {**first, "wall_s": 0} == {**second, "wall_s": 0}
    assert set(first) == {"data", "split", "estimator", "nll", "nll_ci95", "nll_mc_se", "nll_document_se", "ppl",
                          "ppl_ci95", "bits_per_byte", "bits_per_byte_ci95", "bits_per_byte_comparable",
                          "changed_documents", "chunks", "stride", "length",
                          "first_token", "end_token", "tokens", "documents", "draws", "seed", "step", "config_sha256",
                          "wall_s"}
    assert (first["data"], first["split"], first["estimator"], first["step"]) == ("text", "valid", "exact_count", 2)
    assert first["config_sha256"] == json.loads((run / "config.json").read_text())["config_sha256"]
    low, high = first["nll_ci95"]
    assert low < first["nll"] < high
    assert evaluated(run, weights="params")["nll"] != first["nll"]


def test_eval_of_another_text(run, tmp_path):
    documents = write_text(tmp_path / "other.txt", 20, seed=1)
    result = evaluated(run, data=str(tmp_path / "other.txt"))
    assert (result["data"], result["split"]) == (str(tmp_path / "other.txt"), "all")
    assert result["documents"] == len(documents)
    (tmp_path / "dir").mkdir()
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (tmp_path / "dir" / "test.jsonl").write_text(lines)
    result = evaluated(run, data=str(tmp_path / "dir"), split="test")
    assert (result["documents"], result["tokens"]) == (20, sum(len(d.encode()) + 1 for d in documents))


def test_eval_of_missing_things(run, tmp_path):
    with pytest.raises(UserError, match="--data=nothing.txt is no file or directory"):
        evaluated(run, data="nothing.txt")
    with pytest.raises(UserError, match="no run directory .*absent: train first"):
        evaluated(tmp_path / "absent")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UserError, match="no checkpoint in .*: train first"):
        evaluated(tmp_path)
    with pytest.raises(UserError, match="has no test split"):
        evaluated(run, split="test")


def test_eval_with_another_tokenizer_is_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = toy_config(tmp_path)
    other = prepare_tokenizer(dataclasses.replace(config.data, tokenizer="gpt2"))
    other.save(copy / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json is not the file that the run was started with"):
        evaluated(copy)


@pytest.mark.ci_slow
def test_eight_devices_give_the_same_result(run):
    code = """
        import json, sys
        import jax
        from bd3lm_jax.evaluation.evaluate_run import evaluate_run
        from bd3lm_jax.likelihood.options import EstimatorOptions, ModelOptions, TextOptions
        assert len(jax.devices()) == 8
        print(json.dumps(evaluate_run(sys.argv[1], text=TextOptions(split="valid"), model=ModelOptions(batch_size=12),
                                      estimator=EstimatorOptions(draws=2))))
    """
    done = run_python(code, run, devices=8)
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout.splitlines()[-1]), evaluated(run, draws=2)
    assert there.keys() == here.keys()
    for key in there.keys() - {"wall_s"}:
        expected = here[key] if isinstance(here[key], str) else pytest.approx(here[key], rel=1e-6)
        assert there[key] == expected, key
