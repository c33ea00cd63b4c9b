"""What tests read in answers of the OpenAI endpoints."""

from typing import Any

import httpx


def error(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """What a refusal says, in OpenAI's envelope."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    detail: dict[str, Any] = answer.json()["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    return detail
