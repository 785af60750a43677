"""The clock that a chat template reads with ``strftime_now``: one moment for a whole run.

Templates write today's date into the system text.  The moment is recorded with the run and with
its adapter, so that resuming, evaluating and generating on another day, in another time zone or
under another locale writes the same bytes.
"""

from __future__ import annotations

import json
from datetime import datetime

_READER = "strftime_now"
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DIGITS = (
    "%Y", "%m", "%d", "%H", "%I", "%M", "%S", "%y", "%j", "%f", "%G", "%u", "%V", "%w", "%U", "%W",
)  # fmt: skip
_COMPOSED = (
    ("%F", "%Y-%m-%d"), ("%T", "%H:%M:%S"), ("%R", "%H:%M"), ("%D", "%m/%d/%y"), ("%h", "%b"),
    ("%c", "%a %b %e %H:%M:%S %Y"), ("%x", "%m/%d/%y"), ("%X", "%H:%M:%S"), ("%Z", ""), ("%z", ""),
)  # fmt: skip


def reads_clock(template: str) -> bool:
    """Whether a chat template asks for the time."""
    return _READER in template


def now() -> str:
    """The local time to the second, as it is recorded."""
    return datetime.now().isoformat(timespec="seconds")


def is_moment(value: object) -> bool:
    """Whether a recorded value is a time as ``now`` writes it."""
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


def with_clock(template: str, moment: str | None) -> str:
    """``template`` with its clock stopped at ``moment``; itself if it does not read the time.

    A macro takes the place of the function that transformers provides: values passed beside the
    conversation are rebuilt as plain data there, so a function would not arrive.

    Args:
        template: a Jinja chat template.
        moment: as ``now`` writes it; ``None`` is the present one.

    Raises:
        ValueError: if ``moment`` is not a time.
    """
    if not reads_clock(template):
        return template
    texts = _texts(datetime.fromisoformat(moment or now()))
    pairs = [("%%", "\0"), *_COMPOSED, *texts.items(), ("\0", "%")]
    filters = "".join(f"|replace({json.dumps(a)}, {json.dumps(b)})" for a, b in pairs)
    # The line break behind a block is trimmed: what the template writes begins as before.
    return f"{{%- macro {_READER}(format) %}}{{{{ format{filters} }}}}{{%- endmacro %}}\n{template}"


def _texts(moment: datetime) -> dict[str, str]:
    """What every directive stands for, in English whatever the locale."""
    month, day = _MONTHS[moment.month - 1], _DAYS[moment.weekday()]
    texts = {directive: moment.strftime(directive) for directive in _DIGITS}
    short = {f"%-{name[1]}": str(int(texts[name])) for name in _DIGITS}
    return {
        **short,
        **texts,
        "%e": f"{moment.day:2d}",
        "%B": month,
        "%b": month[:3],
        "%A": day,
        "%a": day[:3],
        "%p": "AM" if moment.hour < 12 else "PM",
    }
