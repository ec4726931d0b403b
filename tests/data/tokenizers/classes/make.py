"""How the other files here were made: small vocabularies, and what transformers makes of texts with them.

    pip install transformers sentencepiece protobuf && python tests/data/tokenizers/classes/make.py

Vocabularies are trained on the texts below. `ids.json` holds, by layout, the files of a directory, the class of
transformers that reads it, and the ids of every text (special tokens read, none added). `chats.json` holds chat
templates and what transformers renders with them.
"""

import io
import json
import shutil
import tempfile
from pathlib import Path

import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

HERE = Path(__file__).parent
TEXTS = [
    "Hello world, it's a test: they're here, I'M not.",
    "def f(x):\n    return x ** 2  # squared\n\n\tif x >= 10:\r\n        pass\n",
    "In 1984 and 2024, 3.14159 is 12345678 less than 1,000,000; x²½Ⅷ",
    "日本語のテキスト。中文测试 한국어 คำ",
    "naïve café — “quoted” £5 ‘é’ e\u0301 Å A\u030a ﬁ",  # also not in normal form C
    "emoji 🦙🦙 👩‍👩‍👧 end",
    "  two  spaces   before\n\n\n and trailing  ",
    "a<s>b</s> c <|im_start|>user\nhi<|im_end|><|endoftext|> <tool_call>x</tool_call> end",
    "", " ", "\n", "x",
]
SPECIAL = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<tool_call>": False, "</tool_call>": False}
MESSAGES = [{"role": "system", "content": "be <b>kind</b> é"}, {"role": "user", "content": "hi\n"},
            {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
CHATS = [
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "  {% for m in messages %}\n  {% if m.role == 'system' %}\n  {% continue %}\n  {% endif %}\n{{ m | tojson }}\n"
    "  {% if loop.index > 2 %}{% break %}{% endif %}\n  {% endfor %}\n",
    "{{ messages | tojson(indent=2, ensure_ascii=False) }}|{{ messages | tojson(ensure_ascii=True, sort_keys=True) }}"
    "|{{ {'a': 1} | tojson(separators=(',', ':')) }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}{% endif %}\n{%- endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ bos_token is defined }}{{ pad_token is defined }}{{ tools is none }}{{ unk_token }}",
    "{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y') | length }}{% endif %}",
]


def write_byte_level(directory: Path, added: dict[str, bool], config: dict) -> int:
    """vocab.json and merges.txt, tokens on top in both configs -> size of the vocabulary."""
    vocab = json.loads((HERE / "vocab.json").read_text())
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(HERE / name, directory / name)
    places = {name: len(vocab) + i for i, name in enumerate(added)}
    decoder = {str(places[name]): {"content": name, "lstrip": False, "normalized": False, "rstrip": False,
                                   "single_word": False, "special": special} for name, special in added.items()}
    if added:
        (directory / "added_tokens.json").write_text(json.dumps(places))
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    return len(vocab)


def train_vocabularies() -> None:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.train_from_iterator(4 * [line for text in TEXTS[:7] for line in text.split("\n")], trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=6))
    library.model.save(str(HERE))
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator([text + " " + text.lower() for text in TEXTS[:6]], trainers.WordPieceTrainer(
        vocab_size=260, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    words.model.save(str(HERE))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(8 * [line for text in TEXTS[:7] for line in text.split("\n") if line]),
        model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True, character_coverage=0.98,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["<tool_call>"])
    (HERE / "bpe.model").write_bytes(model.getvalue())


def layouts() -> dict[str, dict]:
    found = {}
    with tempfile.TemporaryDirectory() as work:
        def add(name, build, **load):
            directory = Path(work) / name
            directory.mkdir()
            tokenizer = build(directory)
            files = {path.name: path.read_text() for path in directory.iterdir()
                     if path.suffix == ".json" and path.name != "vocab.json"}
            found[name] = {"class": type(tokenizer).__name__, "files": files,
                           "ids": [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]}

        def byte_level(kind, added, **config):
            def build(directory):
                write_byte_level(directory, added, {"tokenizer_class": kind, **config})
                return getattr(transformers, kind.replace("Dream", "Qwen2")).from_pretrained(directory)
            return build

        usual = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        add("gpt2", byte_level("GPT2Tokenizer", {"<|endoftext|>": True}, **usual))
        add("gpt2 with a space", byte_level("GPT2Tokenizer", {"<|endoftext|>": True}, add_prefix_space=True, **usual))
        add("roberta", byte_level("RobertaTokenizer", {"<s>": True, "</s>": True, "<pad>": True, "<unk>": True,
                                                       "<mask>": True}, mask_token="<mask>", eos_token="</s>"))
        add("qwen2", byte_level("Qwen2Tokenizer", SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>"))
        add("dream", byte_level("DreamTokenizer", SPECIAL | {"<|mask|>": True}, eos_token="<|endoftext|>",
                                mask_token="<|mask|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]))

        def bert(directory, **config):
            shutil.copy(HERE / "vocab.txt", directory / "vocab.txt")
            (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
            return transformers.BertTokenizer.from_pretrained(directory)

        add("bert", lambda directory: bert(directory))
        add("bert cased", lambda directory: bert(directory, do_lower_case=False, tokenize_chinese_chars=False))

        def llama(directory, **config):
            shutil.copy(HERE / "bpe.model", directory / "tokenizer.model")
            config = {"tokenizer_class": "LlamaTokenizer", **config}
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
            return transformers.LlamaTokenizer.from_pretrained(directory)

        add("llama", lambda directory: llama(directory, legacy=False))
        add("llama legacy", lambda directory: llama(directory, legacy=True))

        def llama3(directory):
            vocab = json.loads((HERE / "vocab.json").read_text())
            converter = TikTokenConverter(vocab_file=None)
            merges = [tuple(line.split(" ")) for line in (HERE / "merges.txt").read_text().split("\n")[1:] if line]
            converter.extract_vocab_merges_from_model = lambda _: (vocab, merges)
            library = converter.converted()
            library.model = models.BPE(vocab, merges, ignore_merges=True)
            library.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|endoftext|>")
            tokenizer.save_pretrained(directory)
            return tokenizer

        add("llama3", llama3)
    own = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "bpe.model"))  # special tokens are not read
    count = range(own.get_piece_size())
    kinds = [2 if own.is_unknown(i) else 3 if own.is_control(i) else 6 if own.is_byte(i) else
             4 if own.id_to_piece(i) == "<tool_call>" else 1 for i in count]
    found["sentencepiece"] = {"class": "SentencePieceProcessor", "files": {}, "ids": own.encode(TEXTS),
                              "pieces": [own.id_to_piece(list(count)), [own.get_score(i) for i in count], kinds]}
    return found


def chats() -> list[dict]:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>",
                                                     bos_token="<s>")
    return [{"template": template, "more": more, "text": tokenizer.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=more)}
        for template in CHATS for more in (False, True)]


if __name__ == "__main__":
    train_vocabularies()
    made_with = {"transformers": transformers.__version__, "sentencepiece": sentencepiece.__version__}
    for name, content in (("ids", {"texts": TEXTS, "layouts": layouts()}),
                          ("chats", {"messages": MESSAGES, "chats": chats()})):
        (HERE / f"{name}.json").write_text(json.dumps({"made_with": made_with, **content}) + "\n")
