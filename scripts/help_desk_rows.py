"""Rows of an invented help desk: a message in, the name of its intent out.

usage: python scripts/help_desk_rows.py OUT

Twenty intents with twelve ways to put each: six to train on, two to choose by, four to test with.
Every message is one of these with a beginning and an end that a seeded draw puts around it, so no
test message is a training message in other clothes: its core was never seen.  Each of them is asked
once, since several of one core would not be independent, and the interval of the score too narrow.
All of it was written for loratune.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 20
QUESTION = "Name the intent of this message to a help desk.\n\n{message}"
CORES = {"train": slice(0, 6), "dev": slice(6, 8), "test": slice(8, 12)}
DRESSES = {"train": 6, "dev": 1, "test": 1}
"""How often each core is dressed, each time otherwise."""

OPENINGS = (
    "", "", "", "Hi, ", "Hello, ", "Good morning, ", "Hey team, ", "Excuse me, ",
    "Quick question: ",
    "Sorry to bother you, ", "It is me again: ", "Not urgent, but ", "Urgent: ",
)  # fmt: skip
CLOSINGS = (
    "", "", "", " Thanks!", " Please help.", " Can you look into it?", " I have a meeting at ten.",
    " Regards, Mira", " Tom from sales", " It started on Monday.", " My colleague has the same.",
    " Let me know.", " I already restarted.",
)  # fmt: skip

QUESTION_WORDS = {"how", "what", "which", "who", "where", "why", "is", "can", "could", "would"}

INTENTS: dict[str, tuple[str, ...]] = {
    "reset password": (
        "I forgot my password", "my password has expired and I cannot set a new one",
        "please send me a link to choose another password", "I need my password reset",
        "the old password is gone from my memory, what now", "how do I change my password",
        "my password is rejected since I came back from leave",
        "could somebody give me a new password", "the form for a new password does not appear",
        "I can no longer remember the word I sign in with", "a fresh password for me, please",
        "I would like to pick a different password",
    ),
    "unlock account": (
        "my account is locked", "I typed it wrong three times and now I am locked out",
        "the system says that my user is blocked", "please unlock my account",
        "too many attempts, it will not let me in any more", "my login has been disabled",
        "why is my account suspended", "it says account locked, contact the help desk",
        "I have been locked out after several tries", "can you open my blocked account again",
        "after five failed attempts my user got frozen", "my sign-in is blocked, release it please",
    ),
    "printer trouble": (
        "the printer on the second floor does not print", "my print jobs vanish in the queue",
        "there is a paper jam in the printer", "the printer says offline",
        "pages come out blank from the printer", "I cannot find the printer in the list",
        "the printer prints everything in green", "toner is empty in the hall printer",
        "printing takes forever since the update", "nothing comes out when I press print",
        "the copier by the kitchen eats my paper", "documents stay stuck and never get printed",
    ),
    "wifi trouble": (
        "the wifi drops every few minutes", "I cannot connect to the wireless network",
        "there is no wifi in meeting room four", "the wireless is terribly slow",
        "my laptop does not see the office wifi", "the guest wifi asks for a code",
        "wifi works on my phone but not on my computer", "the wifi signal is weak at my desk",
        "wireless disconnects whenever I walk around", "I keep losing the wireless connection",
        "no wireless reception on the third floor", "my notebook refuses to join the wifi",
    ),
    "vpn trouble": (
        "the vpn does not connect from home", "vpn asks for a certificate that I do not have",
        "I lose the vpn every hour", "the vpn client shows error 809",
        "how do I get into the vpn from abroad", "vpn is connected but I reach no servers",
        "after the update my vpn stopped working", "my vpn profile has disappeared",
        "the tunnel to the office breaks down", "working remotely, the vpn just hangs",
        "I am at home and cannot open the vpn", "the vpn says that the server is unreachable",
    ),
    "install software": (
        "please install the drawing program on my laptop", "I need a PDF editor",
        "can I get the statistics package", "I am not allowed to install programs myself",
        "the new version of the editor should be put on my machine",
        "please add the translation tool to my computer",
        "I want to have the video cutter installed",
        "could you set up the accounting program for me", "I require a newer browser",
        "my project needs a database client on this machine",
        "would you load the design software onto my PC", "an application is missing on my laptop",
    ),
    "license request": (
        "my licence for the spreadsheet program has run out", "I need one more licence for my team",
        "the program says that it is not activated", "how do I get a product key",
        "we want five seats for the new tool", "my trial period ends tomorrow",
        "the software asks for a serial number", "please renew our subscription of the modeller",
        "it complains about an invalid licence", "our seats for the editor are used up",
        "activation failed, a key is required", "could we buy additional licences",
    ),
    "order laptop": (
        "I need a new laptop", "my notebook is five years old, can I have another",
        "please order a computer for our trainee", "which laptop models can I choose from",
        "we have a starter in May who needs a machine",
        "I want to swap my laptop for a lighter one",
        "my team requires two more notebooks", "is there a replacement programme for old laptops",
        "a laptop with more memory would help me", "could you get a notebook for the new hire",
        "it is time for my computer to be replaced", "I would like to request a new machine",
    ),
    "broken screen": (
        "my monitor stays black", "there is a crack in my screen",
        "the display flickers all the time", "lines run across my monitor",
        "my second screen is not detected", "the screen of my laptop is broken",
        "colours on the monitor are all wrong", "my display has dead pixels",
        "the monitor turns off by itself", "half of my screen is dark",
        "I dropped it and now the display is shattered", "the picture on my monitor trembles",
    ),
    "keyboard or mouse": (
        "the letter e on my keyboard sticks", "my mouse does not move any more",
        "I spilled tea over the keyboard", "the wireless mouse needs a new receiver",
        "keys on my keyboard are dead", "the scroll wheel is broken",
        "can I have an ergonomic keyboard", "my mouse double clicks by itself",
        "the space bar no longer works", "my pointer jumps, I think the mouse is done for",
        "several keys do nothing when pressed", "please replace my mouse",
    ),
    "email trouble": (
        "my mailbox is full", "I do not receive any e-mail",
        "messages that I send come back", "the mail program crashes on start",
        "an attachment is too large to send", "my inbox shows nothing since yesterday",
        "how do I get a mail back that I deleted", "mail to our customer never arrives",
        "the mail client asks for settings", "my e-mails stay in the outbox",
        "no new mail has reached me today", "the mail application does not open",
    ),
    "shared mailbox": (
        "I need access to the sales mailbox", "please make a group address for our project",
        "add Jana to the info mailbox", "how can I send from the team address",
        "the shared inbox does not show up", "who owns the press mailbox",
        "remove me from the orders mailbox", "we want a common address for applications",
        "I should be able to read the service inbox", "let Paul into the mailbox of our department",
        "our group wants one address together", "the team inbox is missing in my list",
    ),
    "folder access": (
        "I cannot open the finance folder", "please give me rights to the project drive",
        "access denied on drive P", "my colleague needs to read our folder",
        "I lost my permission for the archive", "who can let me into the contracts folder",
        "the shared drive is missing", "I may read the folder but not write to it",
        "could you grant me access to the design directory", "permission refused on the team drive",
        "I require rights for the folder of the board", "let our intern see the reports directory",
    ),
    "restore file": (
        "I deleted a document by mistake", "please bring back yesterday's version of the table",
        "a folder has disappeared from the drive",
        "can you restore my presentation from the backup",
        "somebody overwrote our plan", "I need a file from last month's backup",
        "my documents are gone after the crash", "the recycle bin no longer has my letter",
        "is there an older copy of this report", "recover a spreadsheet that I removed, please",
        "an important document was erased", "I saved over my thesis and want the old one",
    ),
    "phone trouble": (
        "my desk phone has no dial tone", "calls are cut off after a minute",
        "I cannot hear the other side on the phone", "the voicemail light blinks for ever",
        "how do I forward my calls", "my extension rings at somebody else's desk",
        "the headset of my phone is silent", "callers say that they hear an echo",
        "I would like to divert my line to my mobile", "my telephone is dead",
        "the line crackles during calls", "people cannot reach my extension",
    ),
    "new employee": (
        "a new colleague starts on the first", "please create accounts for our trainee",
        "what do I fill in for a new hire", "our intern needs a user and a mail address",
        "prepare everything for Lena, who joins in June", "we have three people joining our team",
        "set up access for a freelancer who begins on Monday",
        "an additional employee arrives next week", "please enrol our new team member",
        "somebody joins us in autumn and needs all accounts", "onboarding of a student assistant",
        "get things ready for a person who begins soon",
    ),
    "employee leaves": (
        "Peter leaves us at the end of the month", "please close the account of our former intern",
        "a colleague has resigned, what about her data", "delete the user of Mister Lang",
        "our freelancer's contract ends on Friday",
        "who collects the laptop of somebody who leaves",
        "the trainee has finished, remove his access", "forward the mail of a colleague who left",
        "my assistant quits next week", "shut down the login of somebody who is gone",
        "it is Sara's last day tomorrow", "an employee is retiring in March",
    ),
    "suspicious mail": (
        "I got a strange mail with a link", "somebody pretends to be our director",
        "is this message from the bank real", "I clicked on an attachment that looks wrong",
        "this looks like phishing", "a mail asks me for my credentials",
        "where do I report spam", "an unknown sender wants a gift card",
        "I think I fell for a scam mail", "a dubious letter in my inbox demands money",
        "this e-mail seems fake to me", "a weird message wants me to confirm my data",
    ),
    "book room": (
        "I want to book the large meeting room", "is room seven free on Thursday",
        "please cancel my reservation of the hall", "the room calendar shows a double booking",
        "how do I reserve a room with a projector", "we need a room for twenty people",
        "move my booking to two o'clock", "which meeting rooms are available today",
        "reserve a quiet room for an interview", "a place for our workshop next week, please",
        "can I have the conference room tomorrow", "somebody else sits in the room that I reserved",
    ),
    "slow computer": (
        "my computer is terribly slow", "it takes ten minutes to start in the morning",
        "everything hangs when I open the browser", "my laptop gets hot and crawls",
        "the machine freezes several times a day", "programs need ages to open",
        "the fan is loud and nothing moves", "since the update my PC lags",
        "my disk is full and the machine drags", "I wait for minutes after every click",
        "my notebook has become sluggish", "the computer stutters all day long",
    ),
}  # fmt: skip


def dressed(core: str, draw: random.Random) -> str:
    """A message: a core between a beginning and an end."""
    opening, closing = draw.choice(OPENINGS), draw.choice(CLOSINGS)
    start = core if opening else core[0].upper() + core[1:]
    asks = core.split()[0].lower() in QUESTION_WORDS
    end = "?" if asks else draw.choice((".", ".", "!") if closing else (".", "!", ""))
    return f"{opening}{start}{end}{closing}"


def rows(split: str) -> list[dict[str, list[dict[str, str]]]]:
    """The rows of a split, all different, in an order of their own."""
    draw = random.Random(f"{SEED} {split}")
    messages: dict[str, str] = {}
    for intent, cores in INTENTS.items():
        for core in cores[CORES[split]]:
            wanted = len(messages) + DRESSES[split]
            while len(messages) < wanted:
                messages.setdefault(dressed(core, draw), intent)
    shuffled = list(messages.items())
    draw.shuffle(shuffled)
    return [_row(message, intent) for message, intent in shuffled]


def _row(message: str, intent: str) -> dict[str, list[dict[str, str]]]:
    return {
        "messages": [
            {"role": "user", "content": QUESTION.format(message=message)},
            {"role": "assistant", "content": intent},
        ]
    }


def main() -> None:
    """Write train.jsonl, dev.jsonl and test.jsonl."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for split in CORES:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split)]
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{out / split}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
