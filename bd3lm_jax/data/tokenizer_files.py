"""Tokenizers in the files that they are published in, as the JSON text of the library `tokenizers`.

Read are tokenizer.json, vocab.txt (WordPiece), vocab.json with merges.txt (byte-level BPE) and tokenizer.model
(SentencePiece). Beside them tokenizer_config.json, special_tokens_map.json and added_tokens.json name the class that
splits and normalises texts, the special tokens, and tokens on top of the vocabulary.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bd3lm_jax.core.errors import UserError
from bd3lm_jax.core.typed import from_json
from bd3lm_jax.core.untrusted_files import read_text
from bd3lm_jax.data import sentence_pieces
from bd3lm_jax.data.sentence_pieces import Unsupported

TOKENIZER_JSON = "tokenizer.json"
NAMES = "tokenizer.json, vocab.txt or vocab.json"
CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")  # later ones win
END_TOKEN = "<|endoftext|>"
USUAL_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<pad>", "<unk>", "<mask>", END_TOKEN)
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token

# Regular expressions that cut a text into words before byte-level BPE; None: those of GPT-2.
SPLITS = {
    "gpt2": None,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
BYTE_LEVEL = {  # classes of vocab.json and merges.txt: the split
    "GPT2Tokenizer": "gpt2", "RobertaTokenizer": "gpt2", "BartTokenizer": "gpt2", "LongformerTokenizer": "gpt2",
    "Qwen2Tokenizer": "qwen2", "DreamTokenizer": "qwen2",
}
WORD_PIECE = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")
SENTENCE_PIECE = ("LlamaTokenizer",)
QWEN2_MODELS = ("qwen2", "qwen3", "dream", "sdar", "fast_dllm")  # how the model_type of such networks begins


def read_tokenizer_json(path: Path) -> tuple[str, dict]:
    """JSON text and config of a tokenizer.json, with what the config has on top of it."""
    config = config_of(path.parent)
    text = _read_text(path)
    return _with_config(path.name, text, config, _added_tokens(path.parent, config)), config


def read_directory(directory: Path) -> tuple[str, str, dict] | None:
    """Name, JSON text and config of a tokenizer that lies in a directory without tokenizer.json; None if none does.

    Raises Unsupported for another kind, UserError for files that cannot be read.
    """
    config = config_of(directory)
    if (path := directory / "vocab.txt").exists():
        _class_of(path, config, WORD_PIECE)
        return path.name, _word_piece(path, config), config
    if (path := directory / "vocab.json").exists():
        kind = _class_of(path, config, tuple(BYTE_LEVEL))
        split = BYTE_LEVEL[kind] if kind else _usual_split(directory)
        return path.name, _byte_level(path, config, split), config
    if (path := directory / "tokenizer.model").exists():
        kind = _class_of(path, config, SENTENCE_PIECE)
        content = sentence_pieces.read(path, bool(config.get("legacy", False)), kind is None,
                                       config.get("add_prefix_space"))
        return path.name, _with_special_tokens(path, library_form(path.name, json.dumps(content)), config), config
    return None


def config_of(directory: Path) -> dict:
    files = [directory / name for name in CONFIGS]
    return {key: value for file in files if file.exists() for key, value in read_json(file).items()}


def content_of(token: Any) -> str | None:
    """A special token as configs name it: a string, or an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _class_of(path: Path, config: dict, supported: tuple[str, ...]) -> str | None:
    """The class that the config names; None if it names none. Unsupported if that reads the files in another way."""
    name = config.get("tokenizer_class")
    name = name.removesuffix("Fast") if isinstance(name, str) else None
    if name in (None, "PreTrainedTokenizer", "TokenizersBackend"):
        return None
    if name not in supported:
        raise Unsupported(
            f"{path} is read by {name}, supported: {', '.join(supported)}: put a tokenizer.json beside it "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes one)")
    return name


def _usual_split(directory: Path) -> str:
    """Of a directory without tokenizer_class, by its network."""
    path = directory / "config.json"
    kind = str(read_json(path).get("model_type", "")) if path.exists() else ""
    return "qwen2" if kind.lower().startswith(QWEN2_MODELS) else "gpt2"


def _word_piece(path: Path, config: dict) -> str:
    """The JSON form of a BERT tokenizer whose vocabulary is one token a line."""
    library, tokens = load_library(), _read_text(path).split("\n")
    vocab = {token.rstrip("\r"): i for i, token in enumerate(tokens[:-1] if tokens[-1] == "" else tokens)}
    tokenizer = library.Tokenizer(library.models.WordPiece(vocab, unk_token=content_of(config.get("unk_token"))
                                                           or "[UNK]", max_input_chars_per_word=100))
    with library_errors(path.name, f"does not go with the values in {CONFIGS[1]}", Exception):
        tokenizer.normalizer = library.normalizers.BertNormalizer(
            lowercase=config.get("do_lower_case", True), strip_accents=config.get("strip_accents"),
            handle_chinese_chars=config.get("tokenize_chinese_chars", True))
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    return _with_special_tokens(path, tokenizer, config)


def _byte_level(path: Path, config: dict, split: str) -> str:
    """The JSON form of a byte-level BPE with one of SPLITS."""
    library, vocab, merges = load_library(), read_json(path), path.with_name("merges.txt")
    lines = _read_text(merges).split("\n") if merges.exists() else []
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    unknown = content_of(config.get("unk_token")) or "<unk>"
    unknown = unknown if unknown in vocab and split == "gpt2" else None
    with library_errors(path.name, f"does not load, {path} and {merges.name} are no BPE vocabulary", Exception):
        tokenizer = library.Tokenizer(library.models.BPE(vocab, pairs, unk_token=unknown))
    pattern, space = SPLITS[split], bool(config.get("add_prefix_space", False))
    bytes_ = library.pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=pattern is None)
    if pattern is None:
        tokenizer.pre_tokenizer = bytes_
    else:
        words = library.pre_tokenizers.Split(library.Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([words, bytes_])
        tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.decoder = library.decoders.ByteLevel()
    return _with_special_tokens(path, tokenizer, config)


def _with_special_tokens(path: Path, tokenizer: Any, config: dict) -> str:
    """Its JSON form, with the added tokens, and with those tokens marked that are never text: the ones that the config
    names, and the usual ones."""
    added = _added_tokens(path.parent, config)
    _add(path.name, tokenizer, added)
    vocab = tokenizer.get_vocab()
    special = [
        name for name in dict.fromkeys((*_special_names(config), *USUAL_SPECIAL)) if name in vocab and name not in added
    ]
    AddedToken = load_library().AddedToken
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return tokenizer.to_str()


def _special_names(config: dict) -> list[str]:
    """Special tokens by the names that a config has for them."""
    special_names = [content_of(value) for key, value in config.items() if key.endswith("_token")]
    for key in SPECIAL_LISTS:
        tokens = config.get(key) or ()
        special_names += map(content_of, tokens.values() if isinstance(tokens, dict) else tokens)
    return [name for name in special_names if name]


def _added_tokens(directory: Path, config: dict) -> dict[str, tuple[int, dict[str, bool]]]:
    """Content -> id and flags, of added_tokens.json and of the config's added_tokens_decoder, which says more."""
    path, special_names = directory / "added_tokens.json", set(_special_names(config))
    plain = read_json(path) if path.exists() else {}
    found = {content: (i, {"special": content in special_names, "normalized": content not in special_names})
             for content, i in plain.items()}
    decoder = config.get("added_tokens_decoder") or {}
    wrong = f"{directory / CONFIGS[1]}: added_tokens_decoder is no object of ids and tokens with their content"
    if not isinstance(decoder, dict):
        raise UserError(wrong)
    for i, token in decoder.items():
        content = content_of(token)
        if not str(i).isdecimal() or content is None:
            raise UserError(wrong)
        flags = {flag: token[flag] for flag in FLAGS if flag in token} if isinstance(token, dict) else {}
        found[content] = int(i), flags
    if any(type(i) is not int or not all(type(x) is bool for x in flags.values()) for i, flags in found.values()):
        raise UserError(f"{directory}: the added tokens hold ids that are no integers, or flags that are not true or "
                        "false")
    return found


def _add(kind: str, tokenizer: Any, added: dict[str, tuple[int, dict[str, bool]]]) -> None:
    """Add tokens at their ids, which the library gives out one after the other."""
    AddedToken = load_library().AddedToken
    for content, (i, flags) in sorted(added.items(), key=lambda item: item[1][0]):
        with library_errors(kind, "cannot take its added tokens"):
            tokenizer.add_tokens([AddedToken(content, **{"normalized": False, "special": False, **flags})])
        if tokenizer.token_to_id(content) != i:
            raise UserError(f"tokenizer '{kind}': the added token {content!r} is to have id {i}, expected "
                            f"{tokenizer.token_to_id(content)}, the next one after the tokens before it")


def _with_config(kind: str, text: str, config: dict, added: dict) -> str:
    """The JSON form with the added tokens that it lacks, and with the switches of a config that say otherwise."""
    if not (content := from_json(text)) or not isinstance(content, dict):
        return text
    changed = _switch(content.get("pre_tokenizer"), {"add_prefix_space": config.get("add_prefix_space")})
    changed |= _switch(content.get("normalizer"), {
        "lowercase": config.get("do_lower_case"), "strip_accents": config.get("strip_accents"),
        "handle_chinese_chars": config.get("tokenize_chinese_chars")}, "BertNormalizer")
    tokenizer = library_form(kind, json.dumps(content) if changed else text)
    missing = {name: token for name, token in added.items() if tokenizer.token_to_id(name) is None}
    if not (missing or changed):
        return text
    _add(kind, tokenizer, missing)
    return tokenizer.to_str()


def _switch(part: Any, switches: dict[str, Any], kind: str = "") -> bool:
    """Set the switches that a part of a tokenizer has -> whether any was another."""
    if not isinstance(part, dict) or kind and part.get("type") != kind:
        return False
    other = {key: value for key, value in switches.items()
             if isinstance(value, bool) and key in part and part[key] != value}
    part |= other
    return bool(other)


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error}") from None


def read_json(path: Path) -> dict:
    try:
        content = from_json(read_text(path))
    except FileNotFoundError:
        raise UserError(f"tokenizer file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"tokenizer file {path} holds a JSON {type(content).__name__}, expected an object")
    return content


# ---- the library


def load_library():
    try:
        import tokenizers
    except ImportError:
        raise UserError("sub-word tokenizers need the package tokenizers: pip install tokenizers") from None
    return tokenizers


def library_form(kind: str, model: str):
    """The library's tokenizer of a JSON text, the same for every encoding: no padding, no cut, no random merges.

    UserError for what is none, and for added tokens whose ids the library would not keep.
    """
    with library_errors(kind, "is not a Hugging Face tokenizer.json", Exception):
        tokenizer = load_library().Tokenizer.from_str(model)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
        wrong = [(token["content"], token["id"]) for token in json.loads(model).get("added_tokens") or ()
                 if tokenizer.token_to_id(token["content"]) != token["id"]]
    if wrong:
        raise UserError(f"tokenizer '{kind}': the added token {wrong[0][0]!r} has id {wrong[0][1]}, expected "
                        f"{tokenizer.token_to_id(wrong[0][0])}, the next one after the tokens before it")
    return tokenizer


@contextlib.contextmanager
def library_errors(kind: str, what: str, errors: type = OverflowError) -> Iterator[None]:
    """UserError in place of the library's: bare exceptions, panics (which no `except Exception` catches), `errors`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not (panic or type(error) is Exception or isinstance(error, errors)):
            raise
        raise UserError(f"tokenizer '{kind}' {what}: {error}") from None
