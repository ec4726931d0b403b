import pytest

from bd3lm_jax.config import DataConfig


@pytest.fixture
def data_config(tmp_path):
    """A DataConfig of the embedded corpus with its cache in tmp_path; keywords change fields."""

    def make(**changes) -> DataConfig:
        fields = {"source": "austen", "path": "", "name": "", "field": "text", "tokenizer": "bytes", "seq_len": 32,
                  "packing": "wrap", "valid_fraction": 0.1, "cache_dir": str(tmp_path / "cache"), "workers": 1,
                  "density": "", "density_fraction": 1.0, "mixture": ()}
        return DataConfig(**fields | changes)

    return make
