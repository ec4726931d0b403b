"""Names of runs for people."""

from bd3lm_jax.evaluation.titles import key_title, run_titles
from configs import tiny


def titles(*points):
    from bd3lm_jax.config import Config

    configs = []
    for arg, changes in points:
        config = tiny.get_config(arg)
        config.update_from_flattened_dict(changes)
        configs.append(Config.from_dict(config.to_dict()))
    return run_titles(configs)


def test_runs_of_a_family_are_called_by_objective_and_what_differs():
    assert titles(("algo=ar", {}), ("algo=bd3lm,block_size=4", {}), ("algo=bd3lm,block_size=4", {"seed": 1}),
                  ("algo=bd3lm,block_size=4", {"model.decoder_layers": 1}),
                  ("algo=bd3lm,block_size=4", {"train.block_sizes": ((0, 128), (765, 4))}),
                  ("algo=mdlm", {}), ("algo=uniform", {})) == [
        "AR", "BD3-LM, S = 4", "BD3-LM, S = 4, seed 1", "BD3-LM, S = 4, decoder layers: 1",
        "BD3-LM, S = 4, blocks of 128, of 4 from step 765", "MDLM", "uniform-state (DUO)"]


def test_a_key_that_every_run_has_its_own_value_of_is_always_named():
    found = titles(*(("algo=ar", {"optim.lr": lr}) for lr in (1e-4, 2e-4, 4e-4)))
    assert found == ["AR, learning rate 0.0001", "AR, learning rate 0.0002", "AR, learning rate 0.0004"]


def test_keys_as_labels():
    assert [key_title(key) for key in ("optim.lr", "seed", "diffusion.block_size", "model.dropout", "")] == [
        "learning rate", "seed", "block size", "dropout", ""]
