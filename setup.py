from setuptools import find_packages, setup

setup(
    name="bd3lm_jax",
    version="0.1.0",
    description="Block diffusion language models in JAX: train, measure likelihood, generate",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["bd3lm_jax", "bd3lm_jax.*"]),
    package_data={"bd3lm_jax": ["py.typed"], "bd3lm_jax.data": ["resources/*"]},
    install_requires=[
        "absl-py>=2.5",
        "chex>=0.1.92",
        "filelock>=3.20",
        "flax>=0.12.8",
        "importlib_resources>=7.1",  # tensorflow-datasets imports it without asking for it
        "jax>=0.10.2",
        "matplotlib>=3.11",
        "ml-collections>=1.1",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "rich>=15.0",
        "safetensors>=0.8",
        "scipy>=1.17",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.23",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]>=0.10.2"],
        "data": ["tensorflow>=2.21"],  # TFDS needs it to build lm1b and its kin; never to read them
        "test": ["gguf>=0.19", "hypothesis>=6.170", "jinja2>=3.1.6", "pytest>=9.0", "pytest-xdist>=3.8"],
        "harness": ["lm-eval>=0.4.13"],
        "sandbox": ["pyseccomp>=0.1.2"],  # confine generated code where bubblewrap is not there
        "gguf": ["gguf>=0.19"],  # read GGUF files
        "bench": ["torch>=2.9"],  # the other side of `bench --against=torch`
        "tpu_compile": ["libtpu==0.0.42.*"],  # compile for TPUs on a machine without one (the pin of jax 0.10.2)
    },
)
