"""From a GGUF file's vocabulary to the files that a tokenizer is loaded from.

A GGUF file holds tokens, merges or scores, and the *name* of a splitting rule; the rule itself lives in llama.cpp's
code. Here it is written out as tokenizer.json, so that nothing but the `tokenizers` library is needed to serve it.

Source: llama.cpp, src/llama-vocab.cpp (token types, splitting rules, which names keep whole words, BOS defaults).
"""

import json
from typing import Any

import msgspec
import tokenizers

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.gguf_pretokenizers import PRE_TOKENIZERS

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _, _BYTE = range(1, 7)
_SPACE = "\u2581"
_GEMMA = ("gemma", "gemma2", "gemma3")
_TURN_ENDS = frozenset({"<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>"})


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says about its tokens, checked."""

    kind: str
    """``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE)."""
    splitter: str
    """llama.cpp's name of the splitting rule; ``gpt2`` vocabularies only."""
    tokens: list[str]
    types: list[int]
    """llama.cpp's token types, one each."""
    scores: list[float]
    """One each, or none."""
    merges: list[str]
    """``left right``, best first; may be absent from ``llama`` vocabularies."""
    special: dict[str, int]
    """Ids by role: bos, eos, unknown, padding, eot, eom."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    is_gemma: bool
    chat_template: str | None


def build_texts(metadata: dict[str, Any], *, file: str) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and, where the file has one, chat_template.jinja.

    Raises:
        ExportError: no vocabulary, one of an unsupported kind, an unknown splitting rule, or parts that disagree.
    """
    vocabulary = read_vocabulary(metadata, file=file)
    tokenizer_json = json.dumps(build_tokenizer(vocabulary, file=file), ensure_ascii=False).encode()
    try:
        tokenizers.Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises bare Exception, whatever is wrong
        raise ExportError(f"its vocabulary does not make a tokenizer: {error}", file=file) from error
    texts = {
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": _to_json(_tokenizer_config(vocabulary)),
        "generation_config.json": _to_json(_generation_config(vocabulary)),
    }
    if vocabulary.chat_template is not None:
        texts["chat_template.jinja"] = vocabulary.chat_template.encode()
    return texts


def read_vocabulary(metadata: dict[str, Any], *, file: str) -> Vocabulary:
    """The vocabulary, with llama.cpp's defaults for what the file leaves out.

    Raises:
        ExportError: see `build_texts`.
    """

    def get(key: str, kind: type, default: Any) -> Any:
        value = metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not default and not isinstance(value, kind):
            raise ExportError(f"should be a {kind.__name__}", file=file, field=f"tokenizer.ggml.{key}")
        return value

    kind = get("model", str, "")
    if kind not in ("gpt2", "llama"):
        raise ExportError(
            f"{kind!r:.80} is not supported (gpt2: byte-level BPE, llama: SentencePiece BPE)",
            file=file,
            field="tokenizer.ggml.model",
        )
    splitter = get("pre", str, "default")
    if kind == "gpt2" and splitter not in PRE_TOKENIZERS:
        raise ExportError(f"{splitter!r:.80} is not supported", file=file, field="tokenizer.ggml.pre")
    tokens = _strings(get("tokens", list, []), file=file, field="tokens")
    if not tokens:
        raise ExportError("is missing", file=file, field="tokenizer.ggml.tokens")
    types, scores = get("token_type", list, []), get("scores", list, [])
    for field, values in (("token_type", types), ("scores", scores)):
        if values and (len(values) != len(tokens) or isinstance(values[0], str)):
            raise ExportError(f"should be {len(tokens):,} numbers", file=file, field=f"tokenizer.ggml.{field}")
    special = {}
    for role in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        token_id = get(f"{role}_token_id", int, None)
        if token_id is not None and 0 <= token_id < len(tokens):
            special[role] = token_id
    keeps_words_and_bos = kind == "gpt2" and PRE_TOKENIZERS[splitter].ignores_merges
    template = metadata.get("tokenizer.chat_template")
    return Vocabulary(
        kind=kind,
        splitter=splitter,
        tokens=tokens,
        types=types or [_NORMAL] * len(tokens),
        scores=scores,
        merges=_strings(get("merges", list, []), file=file, field="merges"),
        special=special,
        add_bos="bos" in special and get("add_bos_token", bool, kind == "llama" or keeps_words_and_bos),
        add_eos="eos" in special and get("add_eos_token", bool, False),
        add_space_prefix=kind == "llama" and get("add_space_prefix", bool, True),
        is_gemma=metadata.get("general.architecture") in _GEMMA,
        chat_template=template if isinstance(template, str) and template else None,
    )


def build_tokenizer(vocabulary: Vocabulary, *, file: str) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    parts = _byte_level(vocabulary, file=file) if vocabulary.kind == "gpt2" else _sentencepiece(vocabulary)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "post_processor": _post_processor(vocabulary),
        **parts,
    }


def _byte_level(vocabulary: Vocabulary, *, file: str) -> dict[str, Any]:
    if not vocabulary.merges:
        raise ExportError("is missing", file=file, field="tokenizer.ggml.merges")
    rule = PRE_TOKENIZERS[vocabulary.splitter]
    ids = {token: index for index, token in reversed(list(enumerate(vocabulary.tokens)))}
    merges = [merge.split(" ") for merge in vocabulary.merges]
    return {
        "normalizer": {"type": "NFC"} if rule.normalises else None,
        "pre_tokenizer": rule.to_json(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.ignores_merges,
            "vocab": ids,
            # A merge of a token that the vocabulary lost (it held a broken byte sequence) can never apply.
            "merges": [m for m in merges if len(m) == 2 and m[0] in ids and m[1] in ids and m[0] + m[1] in ids],
        },
    }


def _sentencepiece(vocabulary: Vocabulary) -> dict[str, Any]:
    tokens = [_respelled(token) for token in vocabulary.tokens] if vocabulary.is_gemma else vocabulary.tokens
    ids = {token: index for index, token in reversed(list(enumerate(tokens)))}
    if vocabulary.merges:
        merges = [merge.split(" ") for merge in vocabulary.merges]
        merges = [m for m in merges if len(m) == 2 and m[0] in ids and m[1] in ids and m[0] + m[1] in ids]
    else:
        merges = _recovered_merges(vocabulary, ids)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.add_space_prefix:
        prepend = {"type": "Prepend", "prepend": _SPACE}
        normalizer: dict[str, Any] = {"type": "Sequence", "normalizers": [prepend, replace]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    else:
        normalizer = replace
    unknown = vocabulary.special.get("unknown", next(iter(_ids_of(vocabulary, _UNKNOWN)), None))
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": _BYTE in vocabulary.types,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def _respelled(token: str) -> str:
    """Gemma files keep runs of blanks as blanks; its text is matched after blanks became U+2581."""
    return _SPACE * len(token) if token and not token.strip(" ") else token


def _recovered_merges(vocabulary: Vocabulary, ids: dict[str, int]) -> list[list[str]]:
    """The merges that lead to each token, in the order in which SentencePiece would apply them.

    A SentencePiece model stores no merges: any two tokens that make a third may be joined, the best third first. Best
    is the highest score; in Gemma files, whose scores do not follow the merges, it is the lowest id.
    """
    mergeable = {token: index for token, index in ids.items() if vocabulary.types[index] in (_NORMAL, _USER_DEFINED)}
    ranked = []
    for token, index in mergeable.items():
        score = vocabulary.scores[index] if vocabulary.scores and not vocabulary.is_gemma else -index
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append(((-score, -len(left), -len(right), mergeable[left], mergeable[right]), [left, right]))
    ranked.sort(key=lambda item: item[0])
    return [pair for _, pair in ranked]


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in the text before anything else looks at it."""
    listed = []
    always_special = {vocabulary.special.get(role) for role in ("bos", "eos", "eot", "eom")}
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        is_special = kind in (_CONTROL, _UNKNOWN) or index in always_special
        if token and (is_special or kind == _USER_DEFINED):
            spelled = _respelled(token) if vocabulary.is_gemma else token
            listed.append(
                {
                    "id": index,
                    "content": spelled,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": is_special,
                }
            )
    return listed


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """BOS before and EOS after a plain prompt, where the model wants them."""
    if not (vocabulary.add_bos or vocabulary.add_eos):
        return None
    roles = [role for role, wanted in (("bos", vocabulary.add_bos), ("eos", vocabulary.add_eos)) if wanted]
    ids = {vocabulary.tokens[vocabulary.special[role]]: vocabulary.special[role] for role in roles}

    def template(sequences: list[str]) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        for type_id, sequence in enumerate(sequences):
            items += [_special_item(vocabulary, "bos", type_id)] if vocabulary.add_bos else []
            items.append({"Sequence": {"id": sequence, "type_id": type_id}})
            items += [_special_item(vocabulary, "eos", type_id)] if vocabulary.add_eos else []
        return items

    return {
        "type": "TemplateProcessing",
        "single": template(["A"]),
        "pair": template(["A", "B"]),
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in ids.items()},
    }


def _special_item(vocabulary: Vocabulary, role: str, type_id: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": vocabulary.tokens[vocabulary.special[role]], "type_id": type_id}}


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        **{
            name: vocabulary.tokens[vocabulary.special[role]]
            for role, name in names.items()
            if role in vocabulary.special
        },
    }


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Special ids. A completion ends at the model's EOS, and at what its chat template ends a turn with.

    Some files name the end of text as EOS and leave the end of a turn to llama.cpp, which knows these tokens by heart.
    """
    ends = [vocabulary.special[role] for role in ("eos", "eot", "eom") if role in vocabulary.special]
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        is_end = token in _TURN_ENDS and kind in (_CONTROL, _USER_DEFINED)
        if is_end and index not in ends and vocabulary.chat_template and token in vocabulary.chat_template:
            ends.append(index)
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(ends))}
    for role, name in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if role in vocabulary.special:
            config[name] = vocabulary.special[role]
    return config


def _ids_of(vocabulary: Vocabulary, kind: int) -> list[int]:
    return [index for index, token_kind in enumerate(vocabulary.types) if token_kind == kind]


def _strings(values: list[Any], *, file: str, field: str) -> list[str]:
    if values and not isinstance(values[0], str):
        raise ExportError("should be strings", file=file, field=f"tokenizer.ggml.{field}")
    return values


def _to_json(value: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
