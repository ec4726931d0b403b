import pytest

from bd3lm_jax.config import DataConfig


@pytest.fixture
def data_config(tmp_path):
    """A DataConfig of the embedded corpus with its cache in tmp_path; keywords change fields."""

    def make(**changes) -> DataConfig:
        fields = {"tokenizer": "bytes", "seq_len": 32, "valid_fraction": 0.1, "cache_dir": str(tmp_path / "cache"),
                  "workers": 1}
        return DataConfig(**fields | changes)

    return make
