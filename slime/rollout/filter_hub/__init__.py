"""Dynamic sampling: which groups are worth training on."""
