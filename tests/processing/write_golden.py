"""Writes golden_chat.json: what transformers renders for the templates beside this file.

Run after changing a template or a conversation: ``python tests/processing/write_golden.py``. test_chat_template.py
compares ours with the file everywhere, and transformers with the file where it is installed.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

USER = {"role": "user", "content": "What is 2 + 2?"}
SYSTEM = {"role": "system", "content": " Be brief. "}
TURNS = [
    USER,
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "  And in <b>French</b>?\r\n\r\n“é” 猫 🙂 {{ 7 * 7 }} {% raw %}\t"},
]
PREFILL = [USER, {"role": "assistant", "content": "The answer is "}]
CALLS = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": '{"sky": "<clear>"}'},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather & more, in <city>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
THOUGHT = [
    USER,
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "reasoning": "Twice now.", "content": "Yes."},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two."}]},
]
PARTS_PREFILL = [*PARTS, {"role": "assistant", "content": [{"type": "text", "text": "Three"}]}]
DATE = {"date_string": "01 Jan 2026"}
OPEN = {"add_generation_prompt": False, "continue_final_message": True}

CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    ("chatml", [USER], {}),
    ("chatml", [SYSTEM, *TURNS], {}),
    ("chatml", TURNS, {"add_generation_prompt": False}),
    ("chatml", PREFILL, OPEN),
    ("llama3", [SYSTEM, *TURNS], DATE),
    ("llama3", PREFILL, DATE | OPEN),
    ("llama3", CALLS, DATE | {"tools": TOOLS}),
    ("mistral", TURNS, {}),
    ("mistral", PREFILL, OPEN),
    ("gemma", [SYSTEM, *TURNS], {}),
    ("gemma", PARTS, {}),
    ("gemma", PARTS_PREFILL, OPEN),
    ("phi3", [SYSTEM, *TURNS], {}),
    ("phi3", PREFILL, {"add_generation_prompt": False}),
    ("hermes_tools", CALLS, {"tools": TOOLS}),
    ("hermes_tools", [SYSTEM, *TURNS], {"enable_thinking": False}),
    ("hermes_tools", THOUGHT, {"enable_thinking": True}),
    ("training", [SYSTEM, *TURNS, *TURNS], {"documents": [{"title": "T", "text": "D"}]}),
    ("parts_only", PARTS, {}),
    ("vicuna", [SYSTEM, *TURNS], {}),
]


def transformers_text(template: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL_TOKENS)
    options = {"add_generation_prompt": True} | options
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def main() -> None:
    golden = []
    for name, messages, options in CASES:
        template = (HERE / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        text = transformers_text(template, messages, options)
        golden.append({"template": name, "messages": messages, "options": options, "text": text})
    text = json.dumps(golden, indent=1, ensure_ascii=False)
    (HERE / "golden_chat.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
