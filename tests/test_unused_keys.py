"""Keys that another key switches off: one line at the door of a new run, while old runs open."""

import pytest
from toy_runs import rewrite_config, toy_config, write_text

from bd3lm_jax import unused_keys
from bd3lm_jax.checkpoints import rundir
from bd3lm_jax.config import Config
from bd3lm_jax.core.errors import UserError
from bd3lm_jax.data.tokenizers import ByteTokenizer
from configs import common, tiny
from launch.arguments import load_config

CASES = [  # config, words of the command line, the key without effect, and what switches it off
    ("", ["diffusion.schedule=cosine"], "diffusion.schedule='cosine'", "diffusion.corruption='exact_count'"),
    ("", ["diffusion.eps=.01"], "diffusion.eps=0.01", "diffusion.corruption='exact_count'"),
    ("algo=cap", ["diffusion.schedule=cosine"], "diffusion.schedule", "diffusion.corruption"),
    ("algo=mixed", ["diffusion.schedule=cosine"], "diffusion.schedule", "diffusion.corruption"),
    ("", ["diffusion.corruption=bernoulli", "diffusion.clip_low=.3", "diffusion.eps=.2"], "diffusion.eps=0.2",
     "diffusion.clip_low=0.3"),
    ("", ["diffusion.clip_low=.3"], "diffusion.clip_low=0.3", "diffusion.corruption='exact_count'"),
    ("", ["diffusion.corruption=bernoulli", "diffusion.complement=True"], "diffusion.complement", "'bernoulli'"),
    ("algo=priority", ["diffusion.hard=True", "diffusion.weight=3."], "diffusion.weight=3.0", "diffusion.hard=True"),
    ("", ["noise.clip_widths=(.5,.6)"], "noise.clip_widths", "noise.adaptive_noise='none'"),
    ("", ["noise.adaptive_noise=counts", "noise.clip_stride=.1"], "noise.clip_stride=0.1",
     "noise.adaptive_noise='counts'"),
    ("", ["noise.clip_batches=2"], "noise.clip_batches=2", "noise.adaptive_noise='none'"),
    ("", ["noise.count_floor=.2"], "noise.count_floor=0.2", "noise.adaptive_noise='none'"),
    ("", ["noise.count_decay=.9"], "noise.count_decay=0.9", "noise.adaptive_noise='none'"),
    ("", ["train.lora_alpha=8."], "train.lora_alpha=8.0", "train.lora_rank=0"),
    ("block_size=1", ["train.anneal_steps=10"], "train.anneal_steps=10", "diffusion.block_size=1"),
    ("", ["optim.schedule=cosine", "optim.decay_fraction=.5"], "optim.decay_fraction=0.5", "optim.schedule='cosine'"),
    ("", ["optim.schedule=constant", "optim.final_lr_fraction=.5"], "optim.final_lr_fraction=0.5", "'constant'"),
    ("algo=ar", ["model.cond_dim=64"], "model.cond_dim=64", "model.adaln=False"),
    ("", ["data.path=x"], "data.path='x'", "data.source='austen'"),
    ("", ["data.name=wikitext"], "data.name='wikitext'", "data.source='austen'"),
    ("", ["data.source=text", "data.path=x", "data.field=body"], "data.field='body'", "data.source='text'"),
    ("", ["data.source=jsonl", "data.path=x", "data.name=wikitext"], "data.name='wikitext'", "data.source='jsonl'"),
    ("", ["data.valid_fraction=.2"], "data.valid_fraction=0.2", "data.source='austen'"),
    ("", ["data.density_fraction=.5"], "data.density_fraction=0.5", "data.density"),
    ("", ["eval.num_samples=0", "eval.sample_length=64"], "eval.sample_length=64", "eval.num_samples=0"),
    ("algo=ar", ["eval.mc_samples=4"], "eval.mc_samples=4", "diffusion.kind='ar'"),
    ("algo=ssd_lm", ["eval.mc_samples=4"], "eval.mc_samples=4", "diffusion.kind='ssd_lm'"),
    ("algo=ssd_lm", ["checkpoint.keep_best=3"], "checkpoint.keep_best=3", "diffusion.kind='ssd_lm'"),
]


@pytest.mark.parametrize("arg, words, key, by", CASES)
def test_a_key_without_effect_is_one_line_that_names_both(arg, words, key, by):
    spec = f"configs/tiny.py:{arg}" if arg else "configs/tiny.py"
    with pytest.raises(UserError, match="has no effect|have no effect") as error:
        load_config(spec, [f"--config.{word}" for word in words])
    assert key in str(error.value) and by in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words", [
    ["diffusion.schedule=loglinear"], ["optim.schedule=constant"], ["optim.schedule=cosine"], ["eval.num_samples=0"],
    ["diffusion.corruption=bernoulli", "diffusion.schedule=cosine", "diffusion.eps=.01"],
    ["noise.adaptive_noise=counts", "noise.count_floor=.2", "noise.count_decay=.9"], ["diffusion.block_size=1"],
    ["noise.adaptive_noise=clip", "diffusion.corruption=bernoulli", "noise.clip_widths=(.5,.6)",
     "noise.clip_batches=2"],
    ["data.source=jsonl", "data.path=x", "data.field=body", "data.valid_fraction=.2"],
])
def test_keys_with_an_effect_and_what_presets_leave_behind(words):
    load_config("configs/tiny.py", [f"--config.{word}" for word in words])


@pytest.mark.parametrize("algo", common.algorithms())
def test_presets_set_nothing_without_effect(algo):
    config = Config.from_dict(tiny.get_config(f"algo={algo}"))
    named = {rule.key for rule in unused_keys.RULES} - {"eval.rows"}  # of the preset, as no other is
    unused_keys.check(config, named)


def test_a_run_of_an_earlier_version_opens_and_goes_on(tmp_path):
    """Its config holds a schedule that it never used; the same run without that key is no other."""
    write_text(tmp_path / "text.txt", 40)
    config, tokenizer = toy_config(tmp_path).with_vocab(258), ByteTokenizer()
    rundir.create_or_validate(tmp_path / "run", config, tokenizer)
    rewrite_config(tmp_path / "run", {"diffusion": {"schedule": "cosine"}})
    assert rundir.read(tmp_path / "run")[0].diffusion.schedule == "cosine"
    rundir.create_or_validate(tmp_path / "run", config, tokenizer)
    with pytest.raises(UserError, match="optim.lr"):
        rundir.create_or_validate(tmp_path / "run", toy_config(tmp_path, {"optim.lr": 0.5}).with_vocab(258), tokenizer)
