"""Prints docs/reference/arguments.md."""

from slime.arguments import ALL_GROUPS
from slime.config.flags import reference_page

if __name__ == "__main__":
    print(reference_page(ALL_GROUPS), end="")
