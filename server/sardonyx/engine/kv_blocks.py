"""Blocks of the KV cache: who holds which, and what full ones hold for prompts to come.

Floor 3. Bookkeeping over token ids; the runner's steps read and write the blocks. A block is shared by as many
sequences as begin with the same tokens, without a copy: only full blocks are shared, and nobody writes to those again.

**What a full block holds** depends on every token up to its end, so it is named by a chain: a number that stands for
"these tokens after what that number stands for". Numbers are given once and never again, and a name is found by
comparing the tokens, not their hash alone: a hit is a hit. When a name is forgotten, because its block was taken for
something else or a step failed, all that was computed behind it is out of reach as well.

**Free blocks** keep their content until they are taken, those with nothing in them first, then the least recently
used. A sequence's blocks are released from its last to its first, so its end is forgotten before its beginning, which
others are likelier to share.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

_START = 0
"""Stands for no tokens."""
_UNKNOWN = -1
"""Stands for a block that is not full, or whose content is not to be found."""

ID_BYTES = array("i").itemsize


class Content(NamedTuple):
    """The name of what a full block holds."""

    before: int
    """Number of what comes before these tokens."""
    packed_ids: bytes


_NOTHING = Content(_UNKNOWN, b"")


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as `KvBlocks` compares them, `ID_BYTES` each."""
    return array("i", ids).tobytes()


class KvBlocks:
    """The pool. Used by one thread. Every call takes time in proportion to the blocks it touches.

    Args:
        num_blocks: of the cache; block 0 is among them, and nobody ever holds it.
        block_size: tokens of a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._num_usable = num_blocks - 1
        self._num_holders = [0] * num_blocks
        self._numbers = [_UNKNOWN] * num_blocks
        self._contents = [_NOTHING] * num_blocks
        self._found: dict[Content, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._next_number = count(_START + 1)
        self._num_retained = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self._num_usable - len(self._free)

    @property
    def num_usable(self) -> int:
        """All but block 0."""
        return self._num_usable

    @property
    def num_retained_tokens(self) -> int:
        """Tokens that free blocks keep for prompts to come."""
        return self._num_retained * self._block_size

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self._block_size)

    def match(self, packed_ids: bytes, max_tokens: int) -> list[int]:
        """The blocks, held or free, that hold the beginning of a prompt.

        Args:
            packed_ids: of the prompt.
            max_tokens: how many leading tokens may be taken from the cache. The last token of a sequence must be
                computed, so fewer than it has; 0 matches nothing.
        """
        blocks: list[int] = []
        num_bytes, number = self._block_size * ID_BYTES, _START
        for start in range(0, max_tokens // self._block_size * num_bytes, num_bytes):
            block = self._found.get(Content(number, packed_ids[start : start + num_bytes]))
            if block is None:
                break
            blocks.append(block)
            number = self._numbers[block]
        return blocks

    def num_free_among(self, blocks: list[int]) -> int:
        """How many of these nobody holds: to share them takes so many free blocks."""
        return sum(not self._num_holders[block] for block in blocks)

    def take(self, matched: list[int], num_more: int) -> list[int]:
        """Share blocks that hold a sequence's beginning, and take others for the rest.

        Args:
            matched: from `match`, fresh: no other call in between.
            num_more: with those of `matched` that are free, at most `num_free`.

        Returns:
            The sequence's block table, its own list.
        """
        for block in matched:
            if not self._num_holders[block]:
                del self._free[block]
                self._num_retained -= 1
            self._num_holders[block] += 1
        blocks = list(matched)
        for _ in range(num_more):
            self.extend(blocks)
        return blocks

    def extend(self, blocks: list[int]) -> None:
        """Put a free block, there must be one, at the end of a block table."""
        block, _ = self._free.popitem(last=False)
        if self._numbers[block] != _UNKNOWN:
            self._num_retained -= 1
            self._forget(block)
        self._num_holders[block] = 1
        blocks.append(block)

    def fill(self, blocks: list[int], index: int, ids: list[int]) -> None:
        """A sequence has computed the last token of a block: it is found from now on.

        Two sequences may compute the same; then one block of the two is found.

        Args:
            blocks: the sequence's; those before `index` were filled or matched.
            index: of the block in them.
            ids: the sequence's tokens.
        """
        before = self._number_before(blocks, index)
        if before == _UNKNOWN:
            return
        start = index * self._block_size
        block, content = blocks[index], Content(before, pack_ids(ids[start : start + self._block_size]))
        other = self._found.setdefault(content, block)
        self._contents[block] = content
        self._numbers[block] = next(self._next_number) if other == block else self._numbers[other]

    def name(self, blocks: list[int], index: int, packed_ids: bytes) -> Content | None:
        """What a block will hold once it is full.

        Args:
            blocks: those before `index` at least, full and with the same tokens.
            index: of the block.
            packed_ids: the tokens of a sequence.

        Returns:
            The name, equal for all that begin with the same tokens; ``None`` where it will not be found, or they end
            before the block does.
        """
        before = self._number_before(blocks, index)
        start, num_bytes = index * self._block_size * ID_BYTES, self._block_size * ID_BYTES
        if before == _UNKNOWN or start + num_bytes > len(packed_ids):
            return None
        return Content(before, packed_ids[start : start + num_bytes])

    def _number_before(self, blocks: list[int], index: int) -> int:
        return self._numbers[blocks[index - 1]] if index else _START

    def release(self, blocks: list[int], *, is_valid: bool = True) -> None:
        """A sequence holds its blocks no more. What is in them is kept for other prompts, unless it is not valid.

        Args:
            blocks: the whole block table.
            is_valid: the steps that wrote them did not fail. Others who hold the same blocks keep them.
        """
        for block in reversed(blocks):
            if not is_valid:
                self._forget(block)
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            self._free[block] = None
            if self._is_kept(block):
                self._num_retained += 1
            else:
                self._forget(block)
                self._free.move_to_end(block, last=False)

    def _is_kept(self, block: int) -> bool:
        """Whether the block is found by its content. It becomes so if another that held the same was taken."""
        return self._numbers[block] != _UNKNOWN and self._found.setdefault(self._contents[block], block) == block

    def _forget(self, block: int) -> None:
        content = self._contents[block]
        if self._found.get(content) == block:
            del self._found[content]
        self._numbers[block], self._contents[block] = _UNKNOWN, _NOTHING
