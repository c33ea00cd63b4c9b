"""``/v1/billing/usage``: OpenAI's old dashboard endpoint, which some clients ask before anything else.

Floor 5.
"""

from typing import Literal

import msgspec
from litestar import Controller, get

from sardonyx.api.openapi import answers


class BillingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing is billed here."""

    object: Literal["list"] = "list"
    daily_costs: list[None] = []
    total_usage: float = 0
    """In cents."""


class BillingController(Controller):
    """Costs."""

    tags = ("text-generation-webui",)

    @get(["/v1/billing/usage", "/v1/dashboard/billing/usage"], responses=answers(BillingUsage))
    async def billing_usage(self) -> BillingUsage:
        """Always zero, whatever the dates."""
        return BillingUsage()
