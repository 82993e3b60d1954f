"""Which prefixes are in the key-value cache: a radix tree over tokens, evicted least recently used first.

A node covers tokens [start, end) of every sequence below it and refers to the pages that hold them. Where `start` lies
inside a page, the node's first page also holds the tokens before it, so the deepest node of a path always names the
right page of a border. Worked example (page size 4): A = abcdef in pages 1, 2; then B = abcdxy, which shares page 1 and
wrote page 3. The tree is `abcd` [1] with children `ef` [2] and `xy` [3]. C = abcdefgh finds 6 tokens: page 1 to share,
and page 2, to be copied.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from slime.engine.embedded.kv_cache import PAGE_SIZE, KVCache


class PrefixMatch(NamedTuple):
    """The longest known prefix: its length in tokens and the pages that hold it, the last one perhaps in part."""

    length: int
    pages: list[int]


class _Node:
    __slots__ = ("children", "last_used", "pages", "parent", "start", "tokens")

    def __init__(self, tokens: list[int], start: int, pages: list[int], parent: _Node | None) -> None:
        self.tokens, self.start, self.pages, self.parent = tokens, start, pages, parent
        self.children: dict[int, _Node] = {}
        self.last_used = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


def common_length(a: list[int], b: list[int]) -> int:
    """How many leading elements are equal."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit
    while low + 1 < high:
        middle = (low + high) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle
    return low


class PrefixCache:
    """Prefixes of finished work; owns one reference of each page that it names."""

    def __init__(self, kv_cache: KVCache) -> None:
        self._kv_cache = kv_cache
        self._clock = 0
        self._root = _Node([], 0, [], None)
        self.num_tokens = 0

    def match(self, tokens: list[int], limit: int) -> PrefixMatch:
        """The longest known prefix of `tokens[:limit]`. The caller shares the pages before it does anything else."""
        self._clock += 1
        node, position = self._root, 0
        pages: list[int] = []
        while position < limit and (child := node.children.get(tokens[position])) is not None:
            shared = common_length(child.tokens, tokens[position : min(limit, child.end)])
            child.last_used = self._clock
            position += shared
            pages = pages[: child.start // PAGE_SIZE] + child.pages
            node = child
            if shared < len(child.tokens):
                break
        return PrefixMatch(position, pages[: -(-position // PAGE_SIZE)])

    def insert(self, tokens: list[int], pages: list[int]) -> None:
        """Makes `tokens`, held by `pages`, known. What is known already keeps its pages."""
        self._clock += 1
        node, position = self._root, 0
        while position < len(tokens):
            child = node.children.get(tokens[position])
            if child is None:
                self._add_leaf(node, tokens[position:], pages[position // PAGE_SIZE : -(-len(tokens) // PAGE_SIZE)])
                return
            shared = common_length(child.tokens, tokens[position : child.end])
            if shared < len(child.tokens) and position + shared < len(tokens):
                child = self._split(child, shared)
            child.last_used = self._clock
            position += shared
            node = child

    def evict(self, num_pages: int) -> None:
        """Forgets least recently used prefixes until `num_pages` pages are free, or nothing is left."""
        leaves = [(node.last_used, id(node), node) for node in self._nodes() if not node.children]
        heapq.heapify(leaves)
        while leaves and self._kv_cache.num_free_pages < num_pages:
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            assert parent is not None
            del parent.children[node.tokens[0]]
            self._kv_cache.free(node.pages)
            self.num_tokens -= len(node.tokens)
            if parent is not self._root and not parent.children:
                heapq.heappush(leaves, (parent.last_used, id(parent), parent))

    def clear(self) -> None:
        """Forgets everything."""
        for node in self._nodes():
            self._kv_cache.free(node.pages)
        self._root.children.clear()
        self.num_tokens = 0

    def _nodes(self) -> list[_Node]:
        found, stack = [], list(self._root.children.values())
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return found

    def _add_leaf(self, parent: _Node, tokens: list[int], pages: list[int]) -> None:
        leaf = _Node(tokens, parent.end, pages, parent)
        leaf.last_used = self._clock
        parent.children[tokens[0]] = leaf
        self._kv_cache.share(pages)
        self.num_tokens += len(tokens)

    def _split(self, node: _Node, length: int) -> _Node:
        """Cuts `node` after `length` tokens and returns the upper part; a page across the cut is named by both."""
        assert node.parent is not None
        cut = node.start + length
        first_page = node.start // PAGE_SIZE
        upper = _Node(node.tokens[:length], node.start, node.pages[: -(-cut // PAGE_SIZE) - first_page], node.parent)
        upper.last_used = node.last_used
        node.parent.children[upper.tokens[0]] = upper
        lower_pages = node.pages[cut // PAGE_SIZE - first_page :]
        if cut % PAGE_SIZE:
            self._kv_cache.share(lower_pages[:1])
        node.tokens, node.start, node.pages, node.parent = node.tokens[length:], cut, lower_pages, upper
        upper.children[node.tokens[0]] = node
        return upper
