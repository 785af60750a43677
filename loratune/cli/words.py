"""Words of the commands that compose no recipe: folders, and a few ``key=value``."""

from __future__ import annotations

from collections.abc import Sequence

from loratune.errors import ConfigError, did_you_mean, raise_together


def split_words(arguments: Sequence[str], keys: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Plain words in order, and the value of every key.

    Raises:
        ConfigError: for a flag, an unknown key, and a key given twice, all at once.
    """
    plain, values, problems = list[str](), dict[str, str](), list[ConfigError]()
    for word in arguments:
        key, equals, value = word.partition("=")
        listing = f"known here: {', '.join(keys) or 'none'}"
        if word.startswith("-"):
            problems.append(ConfigError(f"no flag '{word}'", where=word, fix=listing))
        elif not equals or "/" in key:
            plain.append(word)
        elif key not in keys:
            fix = f"{did_you_mean(key, keys)} {listing}".strip()
            problems.append(ConfigError(f"'{key}' is not a setting", where=key, fix=fix))
        elif key in values:
            problems.append(ConfigError(f"'{key}' is given twice", where=word, fix="give it once"))
        else:
            values[key] = value
    raise_together(problems)
    return plain, values
