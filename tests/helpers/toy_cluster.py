"""Jobs for tests of clusters: words that a careless quoting would break."""

import subprocess

from bd3lm_jax.experiments import clusters
from bd3lm_jax.experiments.clusters import slices

HOSTILE = ("it's", 'a "b"', "$HOME `id` $(id)", "back\\slash", "semi; colon & | > <", "* ? [x] {a,b} ~ # !",
           "ünïcödé 🙂", "--config=x y", "%j", ": - 'yaml' #", "")
COMMAND = ("train", *HOSTILE)


def job(tmp_path, accelerator="v5litepod-16", **changes):
    told = {"name": "owt", "slice": slices.find(accelerator), "slices": 1, "project": "p'; touch x; '", "cluster": "",
            "zone": "us-central1-a", "shared_dir": "/mnt/it's $HOME", "spot": True, "restarts": 3, "points": 0,
            "out": str(tmp_path / "o'ut $dir"), "command": COMMAND}
    return clusters.Job(**told | changes)


def engine_job(tmp_path, engine, **changes):
    own = {"gcloud": {}, "xpk": {}, "skypilot": {"project": ""},
           "slurm": {"project": "", "zone": "", "spot": False, "accelerator": "H100:16"}}
    return job(tmp_path, **own[engine] | changes)


def bash(text, **options):
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60, **options)
